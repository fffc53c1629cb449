"""How far two runs are apart, in what they logged and in their weights."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from illume_lightning.metric_values import SPEED, Values
from illume_lightning.nn.digests import tensor_digests

SMALLEST = 1e-6
"""Differences of values below this are relative to it, not to them."""


@dataclass(frozen=True)
class Point:
    """A logged value of both runs; none where one of them did not log it."""

    step: int
    name: str
    recorded: float | None
    again: float | None

    @property
    def distance(self) -> float:
        """Relative to the larger value; 0 if they are the same, infinite if one is missing."""
        if self.recorded is None or self.again is None:
            return math.inf
        if self.recorded == self.again or (math.isnan(self.recorded) and math.isnan(self.again)):
            return 0.0
        distance = abs(self.recorded - self.again) / max(abs(self.recorded), abs(self.again), SMALLEST)
        return math.inf if math.isnan(distance) else distance


@dataclass(frozen=True)
class Weight:
    """A tensor of both runs.

    Args:
        name: of it.
        distance: largest difference of an element, relative to the tensor's largest; infinite if one run has no such
            tensor or one of another shape; not a number if nobody knows, since only hashes are there to compare.
    """

    name: str
    distance: float


def compare_series(recorded: Values, again: Values, stop: int | None = None) -> list[Point]:
    """Values of both runs by training step and name, without speeds.

    Args:
        recorded: of one run.
        again: of the other.
        stop: training step before which both are compared, where both logged; by default everything is, and what one
            of them did not log is missing.
    """
    points = []
    for name in recorded.keys() | again.keys():
        if name.startswith(SPEED):
            continue
        one, other = recorded.get(name, {}), again.get(name, {})
        steps = one.keys() | other.keys() if stop is None else one.keys() & other.keys()
        for step in steps:
            if stop is None or step < stop:
                points.append(Point(step, name, one.get(step), other.get(step)))
    return sorted(points, key=lambda point: (point.step, point.name))


def compare_weights(recorded: dict[str, Tensor], again: dict[str, Tensor]) -> list[Weight]:
    """All tensors of both runs, in their order."""
    names = list(dict.fromkeys([*recorded, *again]))
    return [Weight(name, _distance(recorded.get(name), again.get(name))) for name in names]


def compare_digests(recorded: dict[str, str], again: dict[str, Tensor]) -> list[Weight]:
    """The same, where of one run there are only the hashes that its record has."""
    found: dict[str, Any] = tensor_digests(again)
    names = list(dict.fromkeys([*recorded, *found]))
    distances = {True: 0.0, False: math.nan}
    return [
        Weight(
            name,
            distances[recorded[name] == found[name]] if name in recorded and name in found else math.inf,
        )
        for name in names
    ]


def _distance(one: Tensor | None, other: Tensor | None) -> float:
    if one is None or other is None or one.shape != other.shape:
        return math.inf
    if one.dtype == other.dtype and torch.equal(one, other):
        return 0.0
    wide, narrow = one.double(), other.double()
    distance = (wide - narrow).abs().max() / max(float(wide.abs().max()), SMALLEST)
    return math.inf if torch.isnan(distance) else float(distance)
