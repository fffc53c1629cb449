"""Token noise perturbs what it says, where it says, and reproduces the official release."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from illume_lightning.nn.noise import TokenNoise

CODEBOOK = torch.arange(1, 41, dtype=torch.float32).view(10, 4)


def features(batch: int = 64, side: int = 16) -> Tensor:
    """No position equals a code, a zero, or another position."""
    return -1 - torch.rand(batch, 4, side, side, generator=torch.Generator().manual_seed(5))


def replaced(before: Tensor, after: Tensor) -> Tensor:
    """(B, h, w) positions where any channel changed."""
    return (before != after).any(1)


@pytest.mark.parametrize(("kind", "recorded"), [("neighbour", "out_random"), ("zero", "out_zero")])
def test_parity(parity_dir: Path, kind: str, recorded: str) -> None:
    tensors = load_file(parity_dir / "noise_injection.safetensors")
    noise = TokenNoise(kind, sample_probability=0.5, token_probability=0.3)
    out = noise(tensors["quant_pixel_in"], CODEBOOK, torch.Generator().manual_seed(123))
    assert torch.equal(out, tensors[recorded])


def test_the_global_generator_draws_alike(parity_dir: Path) -> None:
    tensors = load_file(parity_dir / "noise_injection.safetensors")
    torch.manual_seed(123)
    out = TokenNoise("zero", 0.5, 0.3)(tensors["quant_pixel_in"], CODEBOOK)
    assert torch.equal(out, tensors["out_zero"])


def test_random_draws_whole_codes_uniformly() -> None:
    before = features()
    after = TokenNoise("random", 1.0, 0.5)(before, CODEBOOK, torch.Generator().manual_seed(0))
    changed = replaced(before, after)
    codes = after.permute(0, 2, 3, 1)[changed]
    index = (codes[:, 0] - 1) / 4
    assert torch.equal(codes, CODEBOOK[index.long()])
    share = index.long().bincount(minlength=10) / len(index)
    assert torch.allclose(share, torch.tensor(0.1), atol=0.015)


@pytest.mark.parametrize("kind", ["random", "neighbour", "zero"])
def test_shares(kind: str) -> None:
    before = features(2000, 8)
    changed = replaced(before, TokenNoise(kind, 0.3, 0.2)(before, CODEBOOK, torch.Generator().manual_seed(0)))
    samples = changed.flatten(1).any(1)
    assert samples.float().mean().item() == pytest.approx(0.3, abs=0.04)
    assert changed[samples].float().mean().item() == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("kind", ["random", "neighbour", "zero"])
def test_extreme_probabilities(kind: str) -> None:
    before = features(4)
    for probabilities in ((0.0, 1.0), (1.0, 0.0)):
        assert torch.equal(TokenNoise(kind, *probabilities)(before, CODEBOOK), before)
    assert replaced(before, TokenNoise(kind, 1.0, 1.0)(before, CODEBOOK)).all()


def test_neighbour_is_the_previous_sample_at_the_same_position() -> None:
    before = features(3)
    after = TokenNoise("neighbour", 1.0, 1.0)(before, CODEBOOK)
    assert torch.equal(after, before[[2, 0, 1]])
    assert torch.equal(TokenNoise("neighbour", 1.0, 1.0)(before[:1], CODEBOOK), before[:1])


def test_none_draws_nothing() -> None:
    before, state = features(2), torch.get_rng_state()
    assert TokenNoise("none", 1.0, 1.0)(before, CODEBOOK) is before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["random", "neighbour", "zero"])
def test_only_kept_positions_carry_gradient(kind: str) -> None:
    before, codebook = features(8).requires_grad_(), CODEBOOK.clone().requires_grad_()
    after = TokenNoise(kind, 0.7, 0.5)(before, codebook, torch.Generator().manual_seed(0))
    after.sum().backward()
    changed = replaced(before, after)
    assert 0 < changed.sum() < changed.numel()
    assert torch.equal(before.grad, (~changed).float()[:, None].expand_as(before))
    assert codebook.grad is None


def test_the_type_of_the_features_is_kept() -> None:
    out = TokenNoise("random", 1.0, 1.0)(features(2).bfloat16(), CODEBOOK)
    assert out.dtype == torch.bfloat16


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"'roll', expected one of none, random, neighbour, zero"):
        TokenNoise("roll")
    with pytest.raises(ValueError, match=r"token_probability is 1.5"):
        TokenNoise("random", 0.1, 1.5)
