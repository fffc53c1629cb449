"""Drawing the next token: what is left, how often it comes, and that neighbours don't matter."""

import pytest
import torch
from torch import Tensor

from illume_lightning.nn.token_sampling import SegmentSampling, TokenSampling, draw, guide, restrict

LAST = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)).item()


def logits(rows: int, count: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(rows, count, generator=torch.Generator().manual_seed(seed))


def uniforms(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


def kept(scores: Tensor) -> list[int]:
    """Tokens of the first row that are drawn from."""
    return scores[0].isfinite().nonzero().flatten().tolist()


def test_temperature_zero_takes_the_most_likely() -> None:
    scores = logits(50, 30)
    drawn = draw(scores, SegmentSampling(0.0, top_k=3, top_p=0.1), uniforms(50))
    assert torch.equal(drawn, scores.argmax(-1))


@pytest.mark.parametrize(
    "sampling", [SegmentSampling(0.7, top_k=1), SegmentSampling(2.0, top_p=1e-6), SegmentSampling(1e-4)]
)
def test_other_ways_to_the_most_likely(sampling: SegmentSampling) -> None:
    scores = logits(50, 30)
    assert torch.equal(draw(scores, sampling, uniforms(50)), scores.argmax(-1))


@pytest.mark.parametrize("top_k", [0, 30, 31, 98304])
def test_top_k_of_all_there_are_or_more_means_all(top_k: int) -> None:
    scores = logits(4, 30)
    assert torch.equal(restrict(scores, SegmentSampling(0.5, top_k)), scores / 0.5)


def test_top_k_keeps_the_most_likely_and_ties() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 0.0, 2.0]])
    assert kept(restrict(scores, SegmentSampling(top_k=2))) == [1, 3]
    assert kept(restrict(scores, SegmentSampling(top_k=3))) == [1, 2, 3, 4, 6]
    assert kept(restrict(scores, SegmentSampling(top_k=6))) == [0, 1, 2, 3, 4, 6]


def test_top_p_keeps_tokens_until_they_reach_it() -> None:
    scores = torch.tensor([[0.2, 0.5, 0.05, 0.25]]).log()
    for top_p, expected in ((0.01, [1]), (0.45, [1]), (0.55, [1, 3]), (0.8, [0, 1, 3]), (0.96, [0, 1, 2, 3])):
        assert kept(restrict(scores, SegmentSampling(top_p=top_p))) == expected, top_p
    # After top-k, of what is left: 0.5 / 0.75.
    assert kept(restrict(scores, SegmentSampling(top_k=2, top_p=0.6))) == [1]
    # After the temperature, which makes them more alike.
    assert kept(restrict(scores, SegmentSampling(100.0, top_p=0.45))) == [1, 3]
    tied = torch.tensor([[0.3, 0.4, 0.3]]).log()
    assert kept(restrict(tied, SegmentSampling(top_p=0.6))) == [0, 1, 2]


@pytest.mark.parametrize(
    "sampling",
    [SegmentSampling(), SegmentSampling(0.5), SegmentSampling(2.0, top_k=5), SegmentSampling(1.0, 0, 0.9)],
)
def test_tokens_come_as_often_as_their_probability_says(sampling: SegmentSampling) -> None:
    count = 20_000
    scores = logits(1, 12, seed=3) / 3
    expected = count * restrict(scores, sampling)[0].softmax(-1)
    drawn = draw(scores.expand(count, -1), sampling, uniforms(count))
    found = torch.bincount(drawn, minlength=12)
    possible = expected > 0
    assert not found[~possible].any()
    chi_square = ((found - expected)[possible] ** 2 / expected[possible]).sum()
    # Beyond this in one of 10,000 seeds at 11 degrees of freedom.
    assert chi_square < 37


def test_equal_numbers_draw_equal_tokens_whatever_the_other_rows_are() -> None:
    sampling = SegmentSampling(1.3, top_k=20, top_p=0.95)
    scores, numbers = logits(40, 60), uniforms(40)
    drawn = draw(scores, sampling, numbers)
    alone = torch.cat([draw(scores[n : n + 1], sampling, numbers[n : n + 1]) for n in range(40)])
    assert torch.equal(drawn, alone)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    assert torch.equal(draw(scores[order], sampling, numbers[order]), drawn[order])
    assert len(drawn.unique()) > 10


@pytest.mark.parametrize("number", [0.0, 0.5, LAST])
@pytest.mark.parametrize(
    "sampling", [SegmentSampling(), SegmentSampling(1.7, 40), SegmentSampling(0.9, 0, 0.7)]
)
def test_what_cannot_come_is_never_drawn(number: float, sampling: SegmentSampling) -> None:
    scores = logits(64, 500)
    masked = torch.rand(64, 500, generator=torch.Generator().manual_seed(2)) < 0.5
    masked[:, :3] = masked[:, -3:] = True
    scores = scores.masked_fill(masked, -torch.inf)
    drawn = draw(scores, sampling, torch.full((64,), number))
    assert restrict(scores, sampling).gather(1, drawn[:, None]).isfinite().all()


def test_rounding_of_parallel_sums_draws_nothing_that_cannot_come(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Tensor.cumsum

    def rough(scores: Tensor, dim: int) -> Tensor:
        noise = torch.rand(scores.shape, generator=torch.Generator().manual_seed(0))
        return plain(scores, dim) + 1e-2 * noise

    monkeypatch.setattr(Tensor, "cumsum", rough)
    scores = logits(300, 40).masked_fill(torch.arange(40) % 3 == 0, -torch.inf)
    for numbers in (uniforms(300), torch.zeros(300), torch.full((300,), LAST)):
        assert (draw(scores, SegmentSampling(), numbers) % 3).all()


def test_half_precision_logits_are_drawn_in_full_precision() -> None:
    scores, numbers = logits(1, 5000).expand(2000, -1), uniforms(2000)
    drawn = draw(scores.bfloat16(), SegmentSampling(4.0), numbers)
    assert torch.equal(drawn, draw(scores.bfloat16().float(), SegmentSampling(4.0), numbers))


def test_guidance_of_logits_is_that_of_log_probabilities() -> None:
    conditional, unconditional = logits(4, 30, 1), logits(4, 30, 2)
    scales = torch.tensor([[1.0], [2.0], [0.0], [1.5]])
    guided = guide(conditional, unconditional, scales)
    c, u = conditional.log_softmax(-1), unconditional.log_softmax(-1)
    torch.testing.assert_close(guided.softmax(-1), (u + scales * (c - u)).softmax(-1))
    torch.testing.assert_close(guided[0], conditional[0])
    torch.testing.assert_close(guided[2], unconditional[2])
    torch.testing.assert_close(guide(conditional, unconditional, 1.5)[3], guided[3])


def test_numbers_out_of_range_are_refused() -> None:
    for temperature in (-0.1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="temperature is"):
            SegmentSampling(temperature)
    with pytest.raises(ValueError, match="top_k is -1: choose 1 or more, or 0"):
        SegmentSampling(top_k=-1)
    for top_p in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="top_p is .*: choose more than 0 and at most 1"):
            SegmentSampling(top_p=top_p)
    with pytest.raises(ValueError, match="guidance is nan: choose a number, 1 for none"):
        TokenSampling(guidance=float("nan"))
