"""Whether a run that was done again is the one that was recorded."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from illume_lightning.reproduction.compare import Point, Weight


@dataclass(frozen=True)
class Verdict:
    """What came out of a comparison.

    Args:
        points: logged values of both runs, by training step and name.
        weights: tensors of both runs; none where they are not compared.
        tolerance: largest relative difference of runs that are called equal.
        scope: what was compared, for people.
    """

    points: Sequence[Point]
    weights: Sequence[Weight]
    tolerance: float
    scope: str

    @property
    def is_same(self) -> bool:
        """Whether nothing differs by more than the tolerance, as far as it is known."""
        return not self._far_points and not self._far_weights

    @property
    def text(self) -> str:
        """The verdict in a few lines, for people."""
        if not self.is_same:
            return f"different: {self.scope}\n" + "\n".join(self._firsts)
        if not any(point.distance for point in self.points) and not any(w.distance for w in self.weights):
            return f"equal: {self.scope}, bit for bit"
        return f"equal within {self.tolerance:g}: {self.scope}\n" + "\n".join(self._largest)

    @property
    def _far_points(self) -> list[Point]:
        return [point for point in self.points if point.distance > self.tolerance]

    @property
    def _far_weights(self) -> list[Weight]:
        return [weight for weight in self.weights if weight.distance > self.tolerance]

    @property
    def _firsts(self) -> list[str]:
        """Where it begins."""
        lines = []
        for point in self._far_points[:1]:
            both = " and ".join(
                f"{'nothing' if value is None else repr(value)} {when}"
                for value, when in ((point.recorded, "recorded"), (point.again, "now"))
            )
            count = len(self._far_points)
            lines.append(
                f"  first at training step {point.step} in {point.name}: {both}; {count} of {len(self.points)} "
                "values differ"
            )
        if not lines and self.points:
            lines.append(f"  all {len(self.points)} logged values are the same within {self.tolerance:g}")
        for weight in self._far_weights[:1]:
            count = len(self._far_weights)
            far = (
                "it is missing or has another shape"
                if math.isinf(weight.distance)
                else f"{weight.distance:.1e}"
            )
            lines.append(
                f"  weights: first {weight.name} ({far}); {count} of {len(self.weights)} tensors differ"
            )
        return [*lines, *self._unknown]

    @property
    def _largest(self) -> list[str]:
        """How far it goes."""
        lines = []
        point = max(self.points, key=lambda point: point.distance)
        if point.distance:
            lines.append(
                f"  metrics: at most {point.distance:.1e} apart, {point.name} at training step {point.step}"
            )
        known = [weight for weight in self.weights if not math.isnan(weight.distance)]
        weight = max(known, key=lambda weight: weight.distance, default=None)
        if weight is not None and weight.distance:
            lines.append(f"  weights: at most {weight.distance:.1e} apart, {weight.name}")
        return [*lines, *self._unknown]

    @property
    def _unknown(self) -> list[str]:
        """What hashes can't tell."""
        names = [weight.name for weight in self.weights if math.isnan(weight.distance)]
        if not names:
            return []
        return [
            f"  weights: {len(names)} of {len(self.weights)} tensors are not the same bit for bit, first {names[0]}; "
            "by how much, only the recorded run's checkpoint could tell"
        ]
