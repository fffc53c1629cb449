"""Confidence limits against textbook values and against what was drawn."""

import numpy as np
import pytest

from illume_lightning.evaluation.statistics import mean, perplexity, share


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), Table I, method 3: Wilson's score without continuity correction.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_shares_have_wilsons_limits(right, n, low, high):
    found = share([True] * right + [False] * (n - right))
    assert found.value == right / n
    assert found.n == n
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)


def test_all_right_is_not_certain():
    found = share([True] * 10)
    assert found.value == found.high == 1
    assert 0.7 < found.low < 0.75


def test_a_mean_has_the_limits_of_the_normal_distribution():
    values = np.random.default_rng(1).normal(3, 2, 400).tolist()
    found = mean(values)
    reach = 1.96 * float(np.std(values)) / 20
    assert found.value == pytest.approx(np.mean(values))
    assert found.low == pytest.approx(found.value - reach, abs=0.03)
    assert found.high == pytest.approx(found.value + reach, abs=0.03)
    assert found == mean(values)


def test_one_value_has_no_spread():
    assert mean([2.5]) == (2.5, 2.5, 2.5, 1)


def test_perplexity_is_of_tokens_and_resamples_answers():
    found = perplexity([1.0, 9.0], [2, 3])
    assert found.value == pytest.approx(np.exp(10 / 5))
    assert found.n == 2
    assert found.low == pytest.approx(np.exp(1 / 2))
    assert found.high == pytest.approx(np.exp(9 / 3))
