"""Doing a schedule's steps: what is finished stays, what was interrupted goes on, what has changed is refused."""

import shlex
import signal
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Literal

from illume_lightning.folder_lock import locked
from illume_lightning.schedule.child import Child, wait_for_end
from illume_lightning.schedule.display import Display, duration, table
from illume_lightning.schedule.elsewhere import finished_elsewhere
from illume_lightning.schedule.outputs import fingerprint, hash_output, ingredients, is_there, move_aside
from illume_lightning.schedule.state import State, StepState
from illume_lightning.schedule.steps import Schedule, Step

PROGRAM = (sys.executable, "-m", "cli")
MODULE = ("-m", "cli")

Changed = Literal["refuse", "redo", "keep"]
"""What becomes of a step whose output was made from something else: an error, it is moved aside and made again,
or the step goes on in it."""

_WAIT_SECONDS = 30.0
_POLL_SECONDS = 0.2
_SAVE_SECONDS = 10.0


class StepError(Exception):
    """A step's command failed.

    Args:
        message: Which one, and how.
        log: What it wrote.
    """

    def __init__(self, message: str, log: Path) -> None:
        super().__init__(message)
        self.log = log


@dataclass(frozen=True)
class Outlook:
    """What is to be done.

    Args:
        text: A table of the steps, and what has changed.
        minutes: That the rest is expected to take.
        unknown: How many steps of the rest are of unknown length.
    """

    text: str
    minutes: float
    unknown: int


@dataclass(frozen=True)
class Place:
    """Where a schedule stands among those of other seeds.

    Args:
        label: Before the name of a step where progress is shown.
        before: Minutes that progress begins at.
        after: Minutes that are still to come.
        shared: Steps that the others do before.
    """

    label: str = ""
    before: float = 0.0
    after: float = 0.0
    shared: Collection[Step] = ()


class Runner:
    """Does a schedule's steps one after the other, each in a process of its own.

    Args:
        schedule: What to do.
        launcher: Program that starts a fit in place of this Python, such as torchrun with its options.
        program: What the words of a command are given to.
    """

    def __init__(
        self, schedule: Schedule, launcher: Sequence[str] = (), program: Sequence[str] = PROGRAM
    ) -> None:
        self.schedule = schedule
        self.state = State.load(schedule)
        self._fit_program = (*launcher, *MODULE) if launcher else tuple(program)
        self._program = tuple(program)
        self._hashes: dict[str, str] = {}
        self._signals: list[int] = []

    def run(self, part: range, changed: Changed = "refuse", place: Place = Place()) -> int:
        """Do a part of the steps; those before it must be finished.

        Args:
            part: Numbers of the steps.
            changed: What becomes of a step whose output was made from something else.
            place: Among other schedules.

        Returns:
            0, or the exit status: 128 + the signal that stopped it. A stopped step goes on at the next start.

        Raises:
            BlockingIOError: If another process does this schedule.
            ValueError: If a step's output was made from something else, or one before the part isn't finished.
            StepError: If a command failed.
        """
        with locked(self.schedule.folder), self._forwarded_signals():
            self._load()
            if self.state.child is not None:
                wait_for_end(self.state.child["pid"], self.state.child["start"], _WAIT_SECONDS)
            self._check(part, changed, ())
            minutes = self.expected(part, place.shared)
            display = Display(self.schedule.steps, minutes, place.label, place.before, place.after)
            try:
                for number in range(part.stop):
                    if not self._signals:
                        self._do(number, changed, display)
            finally:
                display.close()
        return 128 + self._signals[0] if self._signals else 0

    def check(self, part: range, changed: Changed, shared: Collection[Step] = ()) -> None:
        """Refuse before anything starts what can be known now.

        Args:
            part: Numbers of the steps.
            changed: What becomes of a step whose output was made from something else.
            shared: Steps that another schedule has done by then.

        Raises:
            ValueError: If a step's output was made from something else, or one before the part isn't finished.
        """
        self._load()
        self._check(part, changed, shared)

    def status(self, number: int) -> tuple[str, str]:
        """How a step stands: "finished", "continues", "waiting" or "changed"; and what has changed."""
        step, saved = self.schedule.steps[number], self.state.steps[number]
        if saved.state == "waiting":
            if step.is_fit and is_there(step):
                return "changed", f"{step.output} is there already, and not from this schedule"
            return "waiting", ""
        if not is_there(step, partly=saved.state == "running"):
            return "waiting", ""
        difference = self._difference(number)
        if difference and step.command[0] == "report":  # about what there is now, and quickly made
            return "waiting", ""
        if difference:
            begun = "finished" if saved.state == "finished" else "begun"
            return "changed", f"{difference} has changed since it was {begun}"
        if saved.state == "running":
            return "continues", ""
        if self._hash(step) != saved.output_sha256:
            return "changed", f"{step.output} is no longer as it left it"
        return "finished", ""

    def minutes(self, number: int) -> float | None:
        """How long a step takes: as measured here, else as its file says; none if nobody knows."""
        saved = self.state.steps[number]
        return saved.seconds / 60 if saved.state == "finished" else self.schedule.steps[number].minutes

    def expected(self, part: range, shared: Collection[Step] = ()) -> list[float]:
        """Minutes of every step as a progress bar counts them: 1 if nobody knows, 0 if it isn't to be done here.

        Args:
            part: Numbers of the steps; what is before them counts too.
            shared: Steps that another schedule does.
        """
        found = []
        for number, step in enumerate(self.schedule.steps):
            minutes = 0.0 if number >= part.stop or step in shared else self.minutes(number)
            found.append(1.0 if minutes is None else minutes)
        return found

    def summary(self) -> str:
        """A table of the steps and how long they took."""
        rows = [("", "step", "took", "restarts", "output")]
        for number, saved in enumerate(self.state.steps, 1):
            took = duration(saved.seconds) if saved.state == "finished" else saved.state
            rows.append((str(number), saved.name, took, str(saved.restarts or ""), saved.output))
        total = sum(saved.seconds for saved in self.state.steps)
        return table([*rows, ("", "total", duration(total), "", "")])

    def outlook(self, part: range, shared: Collection[Step] = ()) -> Outlook:
        """What is to be done, and how long it will take; nothing is written.

        Args:
            part: Numbers of the steps.
            shared: Steps that another schedule does before.
        """
        self._load()
        rows, notes, left, unknown = [("", "step", "state", "minutes", "command")], [], 0.0, 0
        for number in range(self._count):
            step, (state, reason), minutes = (
                self.schedule.steps[number], self.status(number), self.minutes(number),
            )  # fmt: skip
            if state != "finished" and step in shared:
                state, reason = "shared", ""
            expected = "?" if minutes is None else f"{minutes:.1f}"
            rows.append((str(number + 1), step.name, state, expected, " ".join(step.command)))
            if reason:
                notes.append(f"{step.name}: {reason}\n")
            if number in part and state not in ("finished", "shared"):
                done = self.state.steps[number].seconds / 60 if state == "continues" else 0.0
                left += max((minutes or 0.0) - done, 0.0)
                unknown += minutes is None
        return Outlook(table(rows) + "".join(notes), left, unknown)

    @property
    def _count(self) -> int:
        return len(self.schedule.steps)

    def _check(self, part: range, changed: Changed, shared: Collection[Step]) -> None:
        for number in range(part.stop):
            step = self.schedule.steps[number]
            if step in shared:
                continue
            state, reason = self.status(number)
            if number < part.start and state != "finished":
                raise ValueError(
                    f"step {step.name!r} comes before --from and is not finished{reason and ': ' + reason}; "
                    "do it first"
                )
            if state == "changed" and changed == "refuse":
                raise ValueError(_way_out(step.name, reason))

    def _load(self) -> None:
        """The saved state; what another schedule has made of the same is finished here too."""
        self.state = State.load(self.schedule)
        elsewhere = finished_elsewhere(self.schedule)
        for number, step in enumerate(self.schedule.steps):
            if self.status(number)[0] == "finished":
                continue
            same = elsewhere.get(fingerprint(self._ingredients(number)), {})
            if same and is_there(step) and self._hash(step) in same:
                entry, self.state.ingredients[step.name] = same[self._hash(step)]
                self.state.steps[number] = replace(entry, name=step.name)

    def _do(self, number: int, changed: Changed, display: Display) -> None:
        """Bring one step to its end, unless it is there."""
        step = self.schedule.steps[number]
        state, reason = self.status(number)
        if state == "finished":
            display.skip(number)
            return
        if state == "changed" and changed == "refuse":  # what came before it has become something else
            raise ValueError(_way_out(step.name, reason))
        if state == "changed" and changed == "redo":
            move_aside(step)
            state = "waiting"
        saved = self._begin(number, goes_on=state != "waiting")
        display.start(number, "continues" if saved.restarts else "starts")
        status = self._wait(number, display)
        if self._signals:
            # Not finished, whatever the status: a fit that was told to stop ends with 0.
            return
        log = self.log(number)
        if status:
            how = f"failed with exit status {status}" if status > 0 else f"was ended by signal {-status}"
            raise StepError(f"step {step.name!r} {how}", log)
        self._hashes.pop(step.name, None)
        saved.output_sha256 = self._hash(step)
        if not saved.output_sha256:
            raise StepError(f"step {step.name!r} ended well, but there is no {step.output}", log)
        saved.state = "finished"
        self.state.save()
        display.end(number, saved.seconds)

    def _begin(self, number: int, goes_on: bool) -> StepState:
        """Note that a step begins, or begins again."""
        step, saved = self.schedule.steps[number], self.state.steps[number]
        found = self._ingredients(number)
        # Killed before there was anything to go on from, it still is the same start.
        goes_on |= saved.state == "running" and saved.fingerprint == fingerprint(found)
        if goes_on and saved.started:
            saved.restarts += 1
        else:
            saved = StepState(step.name, [], step.output, started=datetime.now(UTC).isoformat("T", "seconds"))
            self.state.steps[number] = saved
        saved.command, saved.output = list(step.command), step.output
        saved.state, saved.fingerprint, saved.output_sha256 = "running", fingerprint(found), ""
        self.state.ingredients[step.name] = found
        self.state.save()
        return saved

    def _wait(self, number: int, display: Display) -> int:
        """Start a step's command and wait for its end; returns its exit status."""
        step, saved = self.schedule.steps[number], self.state.steps[number]
        program = self._fit_program if step.is_fit else self._program
        log, before, begun, passed_on = self.log(number), saved.seconds, time.monotonic(), 0
        with log.open("a") as file:
            file.write(f"--- {datetime.now(UTC).isoformat('T', 'seconds')} {shlex.join(step.command)}\n")
        child = Child([*program, *step.command], log)
        try:
            self.state.child = {"pid": child.pid, "start": child.start}
            self.state.save()
            saved_at, status = begun, None
            while status is None:
                status = child.wait(_POLL_SECONDS)
                now = time.monotonic()
                saved.seconds = before + now - begun
                if status is None and passed_on < len(self._signals):
                    # Who asks a second time is not to wait for it to save.
                    child.kill() if passed_on else child.stop(self._signals[0])
                    passed_on = len(self._signals)
                if now - saved_at > _SAVE_SECONDS:
                    self.state.save()
                    saved_at = now
                display.progress(number, saved.seconds, log)
        finally:
            child.kill()
        self.state.child = None
        self.state.save()
        return status

    def log(self, number: int) -> Path:
        """The file with what a step's command wrote."""
        return self.schedule.folder / f"{self.schedule.steps[number].name}.log"

    def _ingredients(self, number: int) -> dict[str, str]:
        """What decides a step's output, by what it is called; what isn't made yet has no hash."""
        earlier = zip(self.schedule.steps[:number], self.state.steps[:number], strict=True)
        return ingredients(
            self.schedule.steps[number], [(step, saved.output_sha256) for step, saved in earlier]
        )

    def _difference(self, number: int) -> str:
        """What of a step's ingredients has changed since it was begun; "" if nothing, as far as is known now."""
        recorded = self.state.ingredients.get(self.schedule.steps[number].name, {})
        current = self._ingredients(number)
        different = [name for name in {**current, **recorded} if current.get(name) != recorded.get(name)]
        return next((name for name in different if current.get(name) != ""), "")

    def _hash(self, step: Step) -> str:
        """Hash of a step's output, worked out once: checkpoints are large."""
        if step.name not in self._hashes:
            self._hashes[step.name] = hash_output(step)
        return self._hashes[step.name]

    @contextmanager
    def _forwarded_signals(self) -> Iterator[None]:
        """Keep interrupts and requests to end for the command that runs."""

        def note(number: int, frame: FrameType | None) -> None:
            self._signals.append(number)

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _way_out(name: str, reason: str) -> str:
    return (
        f"step {name!r}: {reason}; --redo moves the output aside and makes it again, as that of later steps that "
        "build on it, --keep goes on in it; nothing is ever deleted"
    )
