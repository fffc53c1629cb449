"""Nearest codes are exact and cheap; the quantisers reproduce the official model."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from illume_lightning.nn import simvq
from illume_lightning.nn.simvq import VQ, SimVQ, kmeans, nearest_code, rotate_to


def dense(x: Tensor, codebook: Tensor) -> Tensor:
    """First nearest code by differences in fp64, all at once."""
    return torch.stack([(codebook.double() - token.double()).square().sum(1).argmin() for token in x])


@pytest.mark.parametrize("num_codes", [1, 5, 63, 64, 65, 1024, 1025, 3000])
@pytest.mark.parametrize("num_tokens", [1, 257, 600])
def test_equals_the_dense_search(num_codes: int, num_tokens: int) -> None:
    torch.manual_seed(num_codes + num_tokens)
    x, codebook = torch.randn(num_tokens, 8), torch.randn(num_codes, 8)
    assert torch.equal(nearest_code(x, codebook), dense(x, codebook))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dim", [1, 2, 32, 100])
def test_equals_the_dense_search_in_other_types(dtype: torch.dtype, dim: int) -> None:
    torch.manual_seed(dim)
    x, codebook = torch.randn(200, dim).to(dtype), torch.randn(500, dim).to(dtype)
    assert torch.equal(nearest_code(x, codebook), dense(x, codebook))


def test_several_tiles_of_tokens() -> None:
    torch.manual_seed(0)
    x, codebook = torch.randn(5000, 4), torch.randn(200, 4)
    assert torch.equal(nearest_code(x, codebook), dense(x, codebook))


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1.0, 1e6])
def test_near_ties_are_decided_in_fp64(scale: float, offset: float) -> None:
    """Codes one fp32 rounding apart and far from each other in the codebook; tokens that tell them apart."""
    torch.manual_seed(0)
    base = (torch.randn(40, 32) + offset) * scale
    up = torch.nextafter(base, torch.full_like(base, torch.inf))
    down = torch.nextafter(base, torch.full_like(base, -torch.inf))
    others = torch.randn(4000, 32) * scale + 50 * scale
    codebook = torch.cat([up, others, base, others + scale, down])
    x = torch.cat([base, up, down, base + 0.3 * scale * torch.randn(40, 32)])
    nearest = nearest_code(x, codebook)
    assert torch.equal(nearest, dense(x, codebook))
    assert torch.equal(nearest[:40], 4040 + torch.arange(40))


def test_a_plain_fp32_search_would_fail_on_these_near_ties() -> None:
    torch.manual_seed(0)
    base = torch.randn(40, 32) + 100
    codebook = torch.cat([torch.nextafter(base, torch.full_like(base, torch.inf)), base])
    assert not torch.equal(torch.cdist(base, codebook).argmin(1), 40 + torch.arange(40))
    assert torch.equal(nearest_code(base, codebook), 40 + torch.arange(40))


def test_exact_ties_go_to_the_lowest_index() -> None:
    torch.manual_seed(0)
    codes = torch.randn(700, 32)
    codebook = torch.cat([codes, codes.flip(0), codes])
    assert torch.equal(nearest_code(codes, codebook), torch.arange(700))
    assert nearest_code(torch.randn(50, 32), torch.ones(3000, 32)).unique().tolist() == [0]
    # Mirror images are equally far from zero.
    assert torch.equal(
        nearest_code(torch.zeros(3, 32), torch.cat([codes, -codes])), dense(torch.zeros(3, 32), codes)
    )


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_products_are_full_fp32_where_training_allows_coarser_ones(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def recording(*args: Tensor, out: Tensor) -> None:
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        score_blocks(*args, out=out)

    score_blocks = simvq._score_blocks
    monkeypatch.setattr(simvq, "_score_blocks", recording)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        nearest_code(torch.randn(20, 32), torch.randn(300, 32))
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["ieee"]


def test_extremes() -> None:
    x = torch.randn(4, 8)
    x[1, 0] = torch.nan
    codebook = torch.randn(200, 8)
    assert nearest_code(x, codebook)[1] == 0
    assert torch.equal(nearest_code(x[2:], codebook), dense(x[2:], codebook))
    assert nearest_code(torch.empty(0, 8), codebook).shape == (0,)
    codebook[7] = 1e4
    assert torch.equal(nearest_code(x[2:], codebook), dense(x[2:], codebook))


@pytest.mark.parametrize(("x", "codebook"), [((4, 8), (5, 9)), ((4, 8), (0, 8)), ((8,), (5, 8))])
def test_unfit_shapes_are_named(x: tuple[int, ...], codebook: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"tokens \(.*codes \("):
        nearest_code(torch.zeros(x), torch.zeros(codebook))


PEAK = """
import resource, torch
from illume_lightning.nn.simvq import nearest_code
torch.set_num_threads(1)
x, codebook = torch.randn({tokens}, 32), torch.randn({codes}, 32)
nearest_code(x[:64], codebook[:128])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
nearest_code(x, codebook)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.parametrize(("codes", "tokens"), [(98304, 4096), (524288, 512)])
def test_memory_is_flat(codes: int, tokens: int) -> None:
    """The distance matrix would take 1.5 GiB and 1 GiB."""
    script = PEAK.format(codes=codes, tokens=tokens)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 96


def test_memory_is_flat_where_every_block_is_in_question() -> None:
    script = PEAK.format(codes=8192, tokens=2048).replace("torch.randn(8192, 32)", "torch.ones(8192, 32)")
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 128


def official_simvq(parity_dir: Path) -> tuple[SimVQ, dict[str, Tensor]]:
    recorded = load_file(parity_dir / "simvq_98304.safetensors")
    quantizer = SimVQ(98304, 32)
    codebook = torch.randn(98304, 32, generator=torch.Generator().manual_seed(7)) * 32**-0.5
    assert torch.equal(codebook[-8:], recorded["frozen_codebook_last8"])
    quantizer.load_state_dict(
        {"frozen_codebook": codebook, "code_transform.weight": recorded["code_transform_weight"]}
    )
    return quantizer, recorded


def test_simvq_parity(parity_dir: Path) -> None:
    quantizer, recorded = official_simvq(parity_dir)
    x = recorded["x"].requires_grad_()
    quantized = quantizer(x)
    assert torch.equal(quantized.indices, recorded["indices"].long())
    torch.testing.assert_close(quantized.features, recorded["quant"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(quantized.loss, recorded["commit_loss"], rtol=1e-6, atol=0)
    weights = torch.arange(x.numel()).reshape(x.shape) % 7
    (quantized.loss + (quantized.features * weights).mean()).backward()
    gradients = load_file(parity_dir / "simvq_98304_grads.safetensors")
    torch.testing.assert_close(x.grad, gradients["grad_x"], rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(
        quantizer.code_transform.weight.grad, gradients["grad_code_transform"], rtol=1e-5, atol=1e-9
    )


def test_rotation_parity(parity_dir: Path) -> None:
    recorded = load_file(parity_dir / "simvq_rotation.safetensors")
    quantizer = SimVQ(256, 32, rotation_trick=True)
    quantizer.load_state_dict(
        {"frozen_codebook": recorded["codebook"], "code_transform.weight": recorded["code_transform_weight"]}
    )
    x = recorded["x"].requires_grad_()
    quantized = quantizer(x)
    torch.testing.assert_close(quantized.features, recorded["quant"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(quantized.loss, recorded["commit_loss"], rtol=1e-6, atol=0)
    (quantized.features**3).sum().backward()
    torch.testing.assert_close(x.grad, recorded["grad_x"], rtol=1e-5, atol=1e-6)


def test_rotation_keeps_the_angle_of_a_gradient() -> None:
    torch.manual_seed(0)
    x, codes = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8)
    upstream = torch.randn(5, 8)
    rotate_to(x, codes).backward(upstream)
    scale = (codes.norm(dim=1) / x.norm(dim=1)).detach()
    angle_before = torch.cosine_similarity(upstream, codes)
    torch.testing.assert_close(torch.cosine_similarity(x.grad, x), angle_before, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad.norm(dim=1), upstream.norm(dim=1) * scale)


def test_rotation_of_zeros_is_finite() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    rotate_to(x, torch.stack([torch.zeros(4), torch.ones(4)])).sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("quantizer", [SimVQ(300, 6), VQ(300, 6)])
def test_features_are_codes_bit_for_bit(quantizer: SimVQ | VQ) -> None:
    latents = torch.randn(2, 6, 5, 7, requires_grad=True)
    quantized = quantizer(latents)
    assert quantized.features.shape == (2, 6, 5, 7)
    assert quantized.indices.shape == (2, 5, 7)
    assert quantized.loss.shape == ()
    assert torch.equal(quantized.features, quantizer.codes_to_features(quantized.indices))
    torch.testing.assert_close(
        quantized.features.permute(0, 2, 3, 1), quantizer.codebook[quantized.indices], rtol=1e-6, atol=1e-6
    )
    tokens = latents.detach().permute(0, 2, 3, 1).reshape(-1, 6)
    assert torch.equal(quantized.indices.flatten(), dense(tokens, quantizer.codebook.detach()))


@pytest.mark.parametrize("kind", [SimVQ, VQ])
def test_gradients(kind: type[SimVQ] | type[VQ]) -> None:
    """Straight through to the latents, none to the codes; the loss's two terms each move one side."""
    torch.manual_seed(0)
    quantizer = kind(50, 6, commitment=0.25)
    latents = torch.randn(2, 6, 4, 4, requires_grad=True)
    upstream = torch.randn(2, 6, 4, 4)
    quantizer(latents).features.backward(upstream)
    assert torch.equal(latents.grad, upstream)
    (parameter,) = quantizer.parameters()
    assert parameter.grad is None

    latents.grad = None
    quantized = quantizer(latents)
    quantized.loss.backward()
    difference = latents.detach() - quantized.features.detach()
    torch.testing.assert_close(latents.grad, 0.25 * 2 * difference / difference.numel())
    torch.testing.assert_close(quantized.loss, 1.25 * difference.square().mean())
    # A small step down the gradient lowers the loss by the step times the gradient's squared norm.
    before, step = quantized.loss.item(), 1e-3
    expected = step * parameter.grad.square().sum().item()
    with torch.no_grad():
        parameter -= step * parameter.grad
        codes = quantizer.codes_to_features(quantized.indices)
        after = (codes - latents).square().mean() + 0.25 * difference.square().mean()
    assert before - after.item() == pytest.approx(expected, rel=0.05)


def test_fp32_under_autocast() -> None:
    torch.manual_seed(0)
    quantizer = SimVQ(2000, 16)
    latents = torch.randn(1, 16, 8, 8)
    plain = quantizer(latents)
    with torch.autocast("cpu", torch.bfloat16):
        under = quantizer(latents)
        assert torch.equal(quantizer.codes_to_features(plain.indices), plain.features)
    assert torch.equal(under.indices, plain.indices)
    assert torch.equal(under.features, plain.features)
    assert torch.equal(under.loss, plain.loss)


@pytest.mark.parametrize("kind", [SimVQ, VQ])
def test_a_model_in_half_precision_runs(kind: type[SimVQ] | type[VQ]) -> None:
    quantizer = kind(100, 8).to(torch.bfloat16)
    quantized = quantizer(torch.randn(1, 8, 3, 3, dtype=torch.bfloat16))
    assert quantized.features.dtype == torch.bfloat16
    assert torch.equal(quantized.features, quantizer.codes_to_features(quantized.indices))


def test_only_the_transform_trains() -> None:
    quantizer = SimVQ(1000, 32)
    assert [name for name, _ in quantizer.named_parameters()] == ["code_transform.weight"]
    assert set(quantizer.state_dict()) == {"frozen_codebook", "code_transform.weight"}
    assert quantizer.frozen_codebook.std().item() == pytest.approx(32**-0.5, rel=0.02)
    bound = VQ(1000, 32).codebook.abs().max().item()
    assert bound == pytest.approx(1 / 1000, rel=0.01)


@pytest.mark.parametrize("kind", [SimVQ, VQ])
def test_codebook_from_data(kind: type[SimVQ] | type[VQ]) -> None:
    """Clusters of latents are found, and quantising them loses little; the draw is repeatable."""
    torch.manual_seed(0)
    centres = 3 * torch.randn(20, 8)
    features = (centres[torch.arange(2000) % 20] + 0.05 * torch.randn(2000, 8)).requires_grad_()
    quantizer, again = kind(60, 8), kind(60, 8)
    untouched = quantizer(features.T[None, :, :, None]).loss.item()
    quantizer.initialise_codebook(features, torch.Generator().manual_seed(1))
    again.initialise_codebook(features, torch.Generator().manual_seed(1))
    assert torch.equal(quantizer.codebook, again.codebook)
    quantized = quantizer(features.T[None, :, :, None])
    assert quantized.loss.item() < 0.01 * untouched
    assert len(quantized.indices.unique()) > 50
    assert [p.requires_grad for p in quantizer.parameters()] == [True]


def test_simvq_starts_from_data_with_the_identity() -> None:
    quantizer = SimVQ(16, 4)
    quantizer.initialise_codebook(torch.randn(40, 4))
    assert torch.equal(quantizer.code_transform.weight, torch.eye(4))
    assert torch.equal(quantizer.frozen_codebook, quantizer.codebook)


def test_fewer_features_than_codes() -> None:
    features = torch.randn(5, 4)
    codes = kmeans(features, 12, torch.Generator().manual_seed(0))
    assert torch.equal(codes[:5], features)
    assert len(codes.unique(dim=0)) == 12
    assert torch.cdist(codes[5:], features).min(1).values.max() < 1.5


def test_bad_input_is_named() -> None:
    quantizer = SimVQ(16, 4)
    with pytest.raises(ValueError, match=r"expected \(B, 4, h, w\)"):
        quantizer(torch.randn(1, 5, 2, 2))
    with pytest.raises(ValueError, match=r"expected \(N, 4\)"):
        quantizer.initialise_codebook(torch.randn(3, 5))
    with pytest.raises(ValueError, match="NaN"):
        quantizer.initialise_codebook(torch.full((3, 4), torch.nan))
    with pytest.raises(ValueError, match="codebook_size is 0"):
        VQ(0, 4)
