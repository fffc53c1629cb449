"""What other schedules have finished: a step that names no seed is done once for all of them."""

import json
from dataclasses import fields

from illume_lightning.schedule.state import STATE, VERSION, StepState
from illume_lightning.schedule.steps import Schedule

Finished = dict[str, dict[str, tuple[StepState, dict[str, str]]]]
"""Entry and ingredients of steps, by fingerprint and by the hash of what they left."""


def finished_elsewhere(schedule: Schedule) -> Finished:
    """Finished steps of the other seeds' and worlds' schedules.

    Args:
        schedule: This one, whose folder is `runs/<world>/schedule/seed<N>`.

    Returns:
        All of them; a file that can't be read vouches for nothing.
    """
    found: Finished = {}
    for path in sorted(schedule.folder.parents[2].glob(f"*/schedule/seed*/{STATE}")):
        if path.parent == schedule.folder:
            continue
        try:
            saved = json.loads(path.read_text())
            for entry in saved["steps"] if saved["version"] == VERSION else ():
                if entry["state"] == "finished":
                    step = StepState(**{item.name: entry[item.name] for item in fields(StepState)})
                    same = found.setdefault(step.fingerprint, {})
                    same[step.output_sha256] = step, saved["ingredients"][step.name]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found
