"""A schedule with several seeds, one after the other, and the table of their scores."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

from illume_lightning.schedule.display import duration, table
from illume_lightning.schedule.runner import PROGRAM, Changed, Outlook, Place, Runner
from illume_lightning.schedule.steps import Schedule, Step


class Seeds:
    """Does the steps of each seed's schedule; steps that name no seed are done for the first and taken by the others.

    Args:
        schedules: One for each seed, of the same file.
        launcher: As of `Runner`.
        program: As of `Runner`.

    Raises:
        ValueError: If two seeds would leave different things in the same place.
    """

    def __init__(
        self, schedules: Sequence[Schedule], launcher: Sequence[str] = (), program: Sequence[str] = PROGRAM
    ) -> None:
        _check_outputs(schedules)
        self.schedules = schedules
        self._launcher, self._program = tuple(launcher), tuple(program)

    def run(self, part: range, changed: Changed = "refuse") -> int:
        """Do a part of the steps with every seed; what can be known of any seed is refused before the first begins.

        Returns:
            0, or the exit status: 128 + the signal that stopped it.

        Raises:
            BlockingIOError: If another process does one of these schedules.
            ValueError: If a step's output was made from something else, or one before the part isn't finished.
            StepError: If a command failed.
        """
        minutes = []
        for number, schedule in enumerate(self.schedules):
            runner, shared = self._runner(schedule), shared_steps(self.schedules, number)
            try:
                runner.check(part, changed, shared)
            except ValueError as error:
                raise ValueError(f"seed {schedule.seed}: {error}") from error
            minutes.append(sum(runner.expected(part, shared)))
        for number, schedule in enumerate(self.schedules):
            place = Place(
                f"seed {schedule.seed} ({number + 1}/{len(minutes)}) ",
                sum(minutes[:number]),
                sum(minutes[number + 1 :]),
                shared_steps(self.schedules, number),
            )
            # A new one: the seeds before may have made anew what this one has looked at.
            status = self._runner(schedule).run(part, changed, place)
            if status:
                return status
        return 0

    def outlook(self, part: range) -> Outlook:
        """What is to be done with every seed, and how long all of it will take; nothing is written."""
        found = [
            self._runner(schedule).outlook(part, shared_steps(self.schedules, number))
            for number, schedule in enumerate(self.schedules)
        ]
        seeds = [f"seed {schedule.seed}\n" for schedule in self.schedules]
        text = "\n".join(seed + outlook.text for seed, outlook in zip(seeds, found, strict=True))
        return Outlook(text, sum(each.minutes for each in found), sum(each.unknown for each in found))

    def summary(self) -> str:
        """A table of the seeds and how long each took; what one took from a seed before is counted there."""
        rows, total = [("seed", "steps", "took", "restarts")], 0.0
        for number, schedule in enumerate(self.schedules):
            shared = shared_steps(self.schedules, number)
            own = [
                saved
                for step, saved in zip(schedule.steps, self._runner(schedule).state.steps, strict=True)
                if step not in shared
            ]
            done, seconds = sum(saved.state == "finished" for saved in own), sum(s.seconds for s in own)
            restarts = sum(saved.restarts for saved in own)
            rows.append((str(schedule.seed), f"{done} of {len(own)}", duration(seconds), str(restarts or "")))
            total += seconds
        return table([*rows, ("total", "", duration(total), "")])

    def write_table(self, part: range) -> int:
        """Let `illume report` write mean and deviation of the part's evaluations, if it has any, and print them.

        Returns:
            Its exit status.
        """
        words = report_command(self.schedules, part)
        return subprocess.run([*self._program, *words], check=False).returncode if words else 0

    def _runner(self, schedule: Schedule) -> Runner:
        return Runner(schedule, self._launcher, self._program)


def table_folder(schedules: Sequence[Schedule]) -> Path:
    """Where the table over the seeds is written; no `seed*`, so that these stay the schedules' folders."""
    seeds = sorted(schedule.seed for schedule in schedules)
    return schedules[0].folder.parent / f"table-{'-'.join(map(str, seeds))}"


def report_command(schedules: Sequence[Schedule], part: range) -> tuple[str, ...]:
    """Words of the command that compares a part's evaluations over the seeds; none if it has no evaluation."""
    steps = [step for schedule in schedules for step in schedule.steps[: part.stop]]
    folders = dict.fromkeys(step.output for step in steps if step.command[0] == "evaluate")
    return ("report", *folders, "--out", str(table_folder(schedules))) if folders else ()


def shared_steps(schedules: Sequence[Schedule], number: int) -> set[Step]:
    """Steps of a seed's schedule that name no seed, so that those before it have them too."""
    return {step for earlier in schedules[:number] for step in earlier.steps}


def _check_outputs(schedules: Sequence[Schedule]) -> None:
    """Refuse a file whose runs don't lie apart."""
    steps: dict[str, Step] = {}
    for schedule in schedules:
        for step in schedule.steps:
            if steps.setdefault(step.output, step).command != step.command:
                raise ValueError(
                    f"step {step.name!r} leaves {step.output} with every seed: put ${{seed}} into its output, "
                    "or give its command a seed of its own"
                )
