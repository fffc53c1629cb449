"""What a run logged while it trained, out of the ``metrics.csv`` of all its starts."""

import math
from dataclasses import dataclass
from pathlib import Path

from illume_lightning.metric_values import Values, read_values

PHASE, SIDE = "curriculum/phase", "curriculum/side"


@dataclass(frozen=True)
class Phase:
    """A stretch of training of one phase, from where it was first logged."""

    index: int
    first_step: int
    side: int | None
    """Pixels."""


@dataclass(frozen=True)
class Metrics:
    """Logged values by name and training step; finite ones only."""

    series: dict[str, list[tuple[int, float]]]
    notes: tuple[str, ...] = ()
    """What could not be used."""

    def last(self, name: str) -> float | None:
        """The value logged last, or None."""
        points = self.series.get(name)
        return points[-1][1] if points else None

    @property
    def last_step(self) -> int:
        """The last training step with anything logged, from 0."""
        return max((points[-1][0] for points in self.series.values()), default=0)

    def phases(self) -> list[Phase]:
        """The phases in their order."""
        sides = dict(self.series.get(SIDE, ()))
        phases: list[Phase] = []
        for step, value in self.series.get(PHASE, ()):
            if not phases or phases[-1].index != int(value):
                side = sides.get(step)
                phases.append(Phase(int(value), step, None if side is None else int(side)))
        return phases

    def validations(self) -> dict[str, dict[str, float]]:
        """The last value of each ``val/<data>/<metric>``, by data and metric."""
        rows: dict[str, dict[str, float]] = {}
        for name, points in self.series.items():
            parts = name.split("/")
            if len(parts) == 3 and parts[0] == "val":
                rows.setdefault(parts[1], {})[parts[2]] = points[-1][1]
        return rows


def read_metrics(run: Path) -> Metrics:
    """Read the metrics of all of a run's starts; what was logged later wins."""
    values, notes = read_values(run)
    notes += _not_finite(values)
    series = {
        name: [(step, value) for step, value in sorted(points.items()) if math.isfinite(value)]
        for name, points in values.items()
    }
    return Metrics({name: points for name, points in series.items() if points}, tuple(notes))


def _not_finite(values: Values) -> list[str]:
    """One line about the names with infinite values or none, the earliest first."""
    firsts = []
    for name, points in values.items():
        steps = [step for step, value in points.items() if not math.isfinite(value)]
        if steps:
            firsts.append((min(steps), name, len(steps)))
    if not firsts:
        return []
    step, name, count = min(firsts)
    more = f"; so are {len(firsts) - 1} other metrics" if len(firsts) > 1 else ""
    return [
        f"{name} is not a finite number {count} times, first at step {step:,}{more}: left out of the curves"
    ]
