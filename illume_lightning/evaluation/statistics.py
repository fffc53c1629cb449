"""Values with their 95 % confidence limits."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

_Z = 1.959964
"""Of the normal distribution's middle 95 %."""
_RESAMPLES = 1000
_SEED = 0


class Estimate(NamedTuple):
    """What was measured."""

    value: float
    low: float
    """Lower limit of the 95 % confidence interval; the value itself where there is none."""
    high: float
    """Upper limit."""
    n: int
    """Number of things measured."""


def share(holds: Sequence[bool]) -> Estimate:
    """How often something holds, 0 to 1, with Wilson's limits, which stay in [0, 1] also at its ends.

    Args:
        holds: at least one.
    """
    n = len(holds)
    p = sum(holds) / n
    middle = p + _Z**2 / (2 * n)
    reach = _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    scale = 1 + _Z**2 / n
    # At the ends of [0, 1] a limit is the share itself, but for rounding.
    return Estimate(p, min(p, max(0.0, (middle - reach) / scale)), max(p, (middle + reach) / scale), n)


def mean(values: Sequence[float]) -> Estimate:
    """The mean with bootstrap limits; the same values always get the same ones.

    Args:
        values: at least one.
    """
    return _bootstrap(np.asarray(values, np.float64)[:, None], lambda sums: sums[..., 0] / len(values))


def perplexity(nats: Sequence[float], tokens: Sequence[int]) -> Estimate:
    """Exponential of the mean nats of a token, with limits by a bootstrap over answers.

    Args:
        nats: of each answer, summed over its tokens; at least one answer.
        tokens: of each answer.
    """
    pairs = np.stack([np.asarray(nats, np.float64), np.asarray(tokens, np.float64)], axis=1)
    return _bootstrap(pairs, lambda sums: np.exp(sums[..., 0] / sums[..., 1]))


def _bootstrap(rows: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> Estimate:
    """A statistic of the sums over rows (n, k), and the middle 95 % of it over resampled rows."""
    n = len(rows)
    # How often each row is drawn; the same as drawing row after row, without n x _RESAMPLES x k numbers.
    counts = np.random.default_rng(_SEED).multinomial(n, np.full(n, 1 / n), size=_RESAMPLES)
    low, high = np.quantile(statistic(counts @ rows), [0.025, 0.975])
    return Estimate(float(statistic(rows.sum(0))), float(low), float(high), n)
