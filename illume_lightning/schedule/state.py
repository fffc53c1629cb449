"""What has been done, in a file that is whole at every instant."""

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from illume_lightning.schedule.steps import Schedule, Step

VERSION = 1
STATE = "state.json"


@dataclass
class StepState:
    """One step's entry.

    Args:
        name: Of the step.
        command: As it was run last.
        output: What it leaves.
        state: "waiting", "running" (begun and not ended well: also killed or failed) or "finished".
        fingerprint: Hash of what decides the output, as of the last start.
        output_sha256: Hash of the output, once finished.
        started: When it was first begun, ISO 8601 in UTC.
        seconds: Time taken so far, over all restarts.
        restarts: How often it was begun again.
    """

    name: str
    command: list[str]
    output: str
    state: str = "waiting"
    fingerprint: str = ""
    output_sha256: str = ""
    started: str = ""
    seconds: float = 0.0
    restarts: int = 0


@dataclass
class State:
    """The state of a schedule.

    Args:
        folder: Where its file is.
        world: As in the schedule.
        seed: As in the schedule.
        steps: Entries of all steps, in order.
        ingredients: Of each step that was begun: hashes of what decides its output, by what they are called.
        child: Process id and start of the command that was started last; none if it has ended.
    """

    folder: Path
    world: str
    seed: int
    steps: list[StepState]
    ingredients: dict[str, dict[str, str]] = field(default_factory=dict)
    child: dict[str, Any] | None = None

    @staticmethod
    def load(schedule: Schedule) -> "State":
        """The saved state, fitted to the schedule's steps by name; all waiting if there is none.

        Raises:
            ValueError: If the file is damaged or of another version.
        """
        path = schedule.folder / STATE
        saved: dict[str, Any] = {}
        if path.is_file():
            try:
                saved = json.loads(path.read_text())
                entries = {entry["name"]: entry for entry in saved["steps"]}
                version = saved["version"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} can't be read ({error}): move it away to begin anew") from error
            if version != VERSION:
                raise ValueError(f"{path} has version {version}, this code reads {VERSION}: move it away")
        else:
            entries = {}
        steps = [_entry(step, entries.get(step.name)) for step in schedule.steps]
        found = saved.get("ingredients", {})
        return State(schedule.folder, schedule.world, schedule.seed, steps, found, saved.get("child"))

    def save(self) -> None:
        """Write the file: until it is whole, the old one stays."""
        content = {
            "version": VERSION,
            "world": self.world,
            "seed": self.seed,
            "steps": [asdict(step) for step in self.steps],
            "ingredients": self.ingredients,
            "child": self.child,
        }
        scratch = self.folder / (STATE + ".writing")
        with scratch.open("w") as file:
            file.write(json.dumps(content, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, self.folder / STATE)


def _entry(step: Step, saved: dict[str, Any] | None) -> StepState:
    """A step's saved entry, or a fresh one."""
    if saved is None:
        return StepState(step.name, list(step.command), step.output)
    return StepState(**{item.name: saved[item.name] for item in fields(StepState)})
