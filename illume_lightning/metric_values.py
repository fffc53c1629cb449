"""What a run logged, out of the ``metrics.csv`` of all its starts."""

import csv
import hashlib
import math
from pathlib import Path

Values = dict[str, dict[int, float]]
"""Logged values by name and training step."""

SPEED = "speed/"
"""Begins the names of what is measured of the machine, not of the model."""

_NO_METRICS = ("step", "epoch")


def metric_files(run: Path) -> list[Path]:
    """All ``metrics/version_*/metrics.csv`` in their order; the only ``metrics.csv`` of a record that was moved."""
    files = sorted((run / "metrics").glob("version_*/metrics.csv"), key=_version)
    alone = run / "metrics.csv"
    return files or ([alone] if alone.is_file() else [])


def read_values(run: Path) -> tuple[Values, list[str]]:
    """Read all of a run's files.

    A restarted run logs some steps again; what was logged later wins.

    Returns:
        The values, also infinite ones and those that are not a number; and notes of what could not be read.
    """
    values: Values = {}
    notes = []
    for path in metric_files(run):
        unreadable = _read(path, values)
        if unreadable:
            notes.append(f"{path}: {unreadable} unreadable cells were left out")
    return values, notes


def hash_values(values: Values) -> str:
    """The sha256 of a series without what begins with `SPEED`: the same however often the run was restarted."""
    digest = hashlib.sha256()
    for name in sorted(values):
        if not name.startswith(SPEED):
            for step, value in sorted(values[name].items()):
                digest.update(f"{name} {step} {value!r}\n".encode())
    return digest.hexdigest()


def _version(path: Path) -> tuple[int, str]:
    number = path.parent.name.removeprefix("version_")
    return (int(number) if number.isdigit() else -1, number)


def _read(path: Path, values: Values) -> int:
    """Add a file's values to those of earlier ones; returns how many cells are no numbers."""
    unreadable = 0
    with path.open(newline="", encoding="utf-8", errors="replace") as stream:
        rows = csv.DictReader(stream)
        try:
            for row in rows:
                # A row that was being written when the run was killed lacks its last cells.
                step = _number(row.get("step") or "")
                if step is None or not math.isfinite(step):
                    unreadable += 1
                    continue
                for name, cell in row.items():
                    if not isinstance(cell, str) or not cell or name in _NO_METRICS:
                        continue
                    value = _number(cell)
                    if value is None:
                        unreadable += 1
                    else:
                        values.setdefault(name, {})[int(step)] = value
        except csv.Error:
            unreadable += 1
    return unreadable


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
