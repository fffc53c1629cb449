"""What a schedule's ``state.json`` says of its steps."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from illume_lightning.json_record import field, finite, objects, read_versioned, texts

VERSION = 1


@dataclass(frozen=True)
class Step:
    """One command of the schedule."""

    name: str
    command: tuple[str, ...]
    """Words after ``illume``."""

    output: str
    """What it leaves, as the schedule names it."""

    state: str
    """finished, running or waiting."""

    fingerprint: str
    output_sha256: str
    started: str
    """ISO date and time of the first start; empty before."""

    seconds: float
    """Of all its starts together."""

    restarts: int

    @property
    def is_fit(self) -> bool:
        """Whether it trains a part, so that its output is a run."""
        return self.command[:1] == ("fit",)

    @property
    def shown(self) -> str:
        """The whole command, to be given to a shell."""
        return shlex.join(("illume", *self.command))


@dataclass(frozen=True)
class ScheduleState:
    """A schedule and how far it has come."""

    folder: Path
    world: str
    seed: int
    steps: tuple[Step, ...]

    def path(self, output: str) -> Path:
        """Where an output lies: beside this schedule's own ``runs``, or else relative to the present folder."""
        folder = self.folder.resolve()
        beside = folder.parents[min(3, len(folder.parents) - 1)] / output
        return beside if beside.exists() else Path(output)


def read_state(folder: Path) -> ScheduleState:
    """Read ``state.json``.

    Args:
        folder: of a schedule, ``runs/<world>/schedule/seed<N>``.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not readable, lacks something, or is of a newer version.
    """
    path = folder / "state.json"
    made_by = "`illume schedule FILE.yaml`"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there: give the folder of a schedule, such as runs/shapes/schedule/seed0, "
            f"which {made_by} makes"
        )
    record = read_versioned(path, VERSION, made_by)
    try:
        world, seed = field(record, "world", str), field(record, "seed", int)
        steps = [_step(step) for step in objects(record, "steps")]
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {made_by} writes it anew") from error
    # A report that is itself a step of the schedule is about the others.
    return ScheduleState(
        folder, world, seed, tuple(step for step in steps if step.command[:1] != ("report",))
    )


def _step(record: dict[str, Any]) -> Step:
    return Step(
        name=field(record, "name", str),
        command=texts(record, "command"),
        output=field(record, "output", str),
        state=field(record, "state", str),
        fingerprint=field(record, "fingerprint", str, optional=True) or "",
        output_sha256=field(record, "output_sha256", str, optional=True) or "",
        started=field(record, "started", str, optional=True) or "",
        seconds=finite(record, "seconds") or 0.0,
        restarts=field(record, "restarts", int, optional=True) or 0,
    )
