"""Losses reproduce the official release's numbers; gradients go where they should."""

import json
import math
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from illume_lightning.nn.checkpoints import build_official
from illume_lightning.nn.discriminator import PatchDiscriminator
from illume_lightning.nn.dualvitok import DualViTokOutput, Encoded
from illume_lightning.nn.losses import (
    DualViTokLoss,
    Perceptual,
    adaptive_weight,
    cosine_loss,
    foreground,
    hinge_discriminator_loss,
    hinge_generator_loss,
)
from illume_lightning.nn.simvq import Quantized


def from_recipe(key: str, shape: list[int]) -> Tensor:
    """The recorded LPIPS network's tensor of this name."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    values = torch.randn(shape, generator=generator)
    if key.startswith("lin"):
        return values.abs() / shape[1]
    if key.endswith("bias"):
        return values * 0.05
    return values * math.sqrt(2 / math.prod(shape[1:]))


@pytest.fixture(scope="module")
def recorded(parity_dir: Path) -> dict[str, Any]:
    return json.loads((parity_dir / "losses.json").read_text())


@pytest.fixture(scope="module")
def pictures(parity_dir: Path) -> dict[str, Tensor]:
    tensors = load_file(parity_dir / "patchgan_tiny.safetensors")
    return {name: tensors[f"{name}_u8"].float() / 127.5 - 1 for name in ("real", "fake")}


@pytest.fixture(scope="module")
def backbone(recorded: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as torchvision writes it, with the recorded network's backbone."""
    state = {}
    for key, shape in recorded["lpips_keys"].items():
        if key.startswith("net."):
            state[".".join(["features", *key.split(".")[2:]])] = from_recipe(key, shape)
    path = tmp_path_factory.mktemp("weights") / "vgg16.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def perceptual(backbone: Path, recorded: dict[str, Any]) -> Perceptual:
    """LPIPS with the recorded network's heads too."""
    network = Perceptual(str(backbone))
    for i, head in enumerate(network.network.lins):
        key = f"lin{i}.model.1.weight"
        head.model[-1].weight.data = from_recipe(key, recorded["lpips_keys"][key])
    return network


@pytest.fixture(scope="module")
def discriminator(parity_dir: Path) -> PatchDiscriminator:
    tensors = load_file(parity_dir / "patchgan_tiny.safetensors")
    network = PatchDiscriminator(width=16)
    network.load_state_dict(
        {k.removeprefix("state_dict."): v for k, v in tensors.items() if k.startswith("state_dict.")}
    )
    return network.eval()


def output(
    reconstruction: Tensor,
    semantic: tuple[Tensor, Tensor] | None = None,
    semantic_codebook: float | None = None,
    pixel_codebook: float | None = None,
) -> DualViTokOutput:
    """A forward pass with these values; features and indices don't matter to the loss."""

    def quantized(loss: float | None) -> Quantized | None:
        return None if loss is None else Quantized(torch.empty(0), torch.tensor(loss), torch.empty(0))

    ours, target = semantic or (None, None)
    encoded = Encoded(quantized(semantic_codebook), quantized(pixel_codebook), target, (16, 16))
    return DualViTokOutput(reconstruction, ours, encoded)


def test_lpips_parity(parity_dir: Path, perceptual: Perceptual, pictures: dict[str, Tensor]) -> None:
    tensors = load_file(parity_dir / "lpips_recipe.safetensors")
    first = perceptual.network.net.slice5[-2].weight.flatten()[:8]
    assert torch.equal(first, tensors["check_net_slice5_28_weight_first8"])
    distances = perceptual(pictures["fake"], pictures["real"])
    torch.testing.assert_close(distances, tensors["lpips_256"].flatten(), rtol=1e-5, atol=0)
    real, fake = (pictures[name][:, :, :64, :64] for name in ("real", "fake"))
    fake = fake.clone().requires_grad_()
    distances = perceptual(fake, real)
    torch.testing.assert_close(distances, tensors["lpips_64"].flatten(), rtol=1e-5, atol=0)
    distances.mean().backward()
    error = (fake.grad - tensors["grad_64"]).abs().max() / tensors["grad_64"].abs().max()
    assert error < 1e-4


def test_lpips_is_frozen_and_stays_in_evaluation_mode(perceptual: Perceptual) -> None:
    perceptual.train()
    assert not any(module.training for module in perceptual.modules())
    assert not any(parameter.requires_grad for parameter in perceptual.parameters())
    a, b = torch.rand(2, 1, 3, 32, 32) * 2 - 1
    assert torch.equal(perceptual(a, b), perceptual(a, b))


def test_lpips_has_the_packages_heads_and_leaves_the_generator_alone(backbone: Path) -> None:
    import lpips

    state = torch.get_rng_state()
    network = Perceptual(str(backbone))
    assert torch.equal(torch.get_rng_state(), state)
    heads = torch.load(
        Path(lpips.__file__).parent / "weights/v0.1/vgg.pth", map_location="cpu", weights_only=True
    )
    for i in range(5):
        assert torch.equal(network.network.lins[i].model[-1].weight, heads[f"lin{i}.model.1.weight"])


def test_lpips_gradient_is_finite_where_all_features_are_zero(perceptual: Perceptual) -> None:
    with torch.no_grad():
        biases = [(m, m.bias.clone()) for m in perceptual.modules() if getattr(m, "bias", None) is not None]
        for module, _ in biases:
            module.bias.fill_(-100.0)
    x = torch.zeros(1, 3, 32, 32, requires_grad=True)
    perceptual(x, torch.ones(1, 3, 32, 32)).sum().backward()
    for module, bias in biases:
        module.bias.data = bias
    assert torch.isfinite(x.grad).all()


def test_lpips_without_its_backbone_is_an_error(
    backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=r"vgg16-397923af\.pth.*backbone_weights.*perceptual_weight: 0"
    ):
        Perceptual()
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        Perceptual(str(tmp_path / "nowhere.pth"))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "vgg16-397923af.pth").symlink_to(backbone)
    Perceptual()
    torch.save({"features.0.weight": torch.zeros(2, 3, 3, 3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth is no state dict of torchvision's vgg16"):
        Perceptual(str(tmp_path / "other.pth"))


@pytest.mark.parametrize("kind", ["l1", "l2"])
@pytest.mark.parametrize("step", [50, 100, 101])
def test_generator_parity(
    kind: str,
    step: int,
    recorded: dict[str, Any],
    pictures: dict[str, Tensor],
    perceptual: Perceptual,
    discriminator: PatchDiscriminator,
) -> None:
    loss = DualViTokLoss(kind, adversarial_weight=0.5, adversarial_start=100)
    logits = discriminator(pictures["fake"]) if loss.is_adversarial(step) else None
    forward = output(pictures["fake"], pixel_codebook=recorded["inputs"]["pixel_commit"])
    terms = loss.generator(pictures["real"], forward, perceptual, logits)
    expected = recorded["generator"][f"{kind}@{step}"]
    assert terms["loss"].item() == pytest.approx(expected["loss"], rel=1e-5)
    assert terms["pixel_loss"].item() == pytest.approx(expected["rec_loss"], rel=1e-5)
    assert terms["perceptual_loss"].item() == pytest.approx(expected["p_loss"], rel=1e-4)
    assert terms["pixel_codebook_loss"].item() == pytest.approx(expected["vq_loss"], rel=1e-6)
    assert ("adversarial_loss" in terms) == (step >= 100)
    if step == 101:
        assert terms["adversarial_loss"].item() == pytest.approx(expected["generator_adv_loss"], rel=1e-4)


@pytest.mark.parametrize("step", [100, 101])
def test_discriminator_parity(
    step: int, recorded: dict[str, Any], pictures: dict[str, Tensor], discriminator: PatchDiscriminator
) -> None:
    loss = DualViTokLoss(adversarial_weight=0.5, adversarial_start=100)
    terms = loss.discriminator(discriminator(pictures["real"]), discriminator(pictures["fake"]))
    expected = recorded["discriminator"][f"l2@{step}"]
    assert terms["discriminator_loss"].item() == pytest.approx(expected["loss"], rel=1e-5)
    assert terms["real_logits"].item() == pytest.approx(expected["logits_real"], rel=1e-4)
    assert terms["fake_logits"].item() == pytest.approx(expected["logits_fake"], rel=1e-4)


def test_semantic_parity(parity_dir: Path, recorded: dict[str, Any], pictures: dict[str, Tensor]) -> None:
    tensors = load_file(parity_dir / "dualvitok_tiny_256x256_b2.safetensors")
    expected = recorded["semantic"]["cos"]
    semantic = (tensors["semantic_reconstruction"], tensors["semantic_target"])
    assert cosine_loss(*semantic).item() == pytest.approx(expected["semantic_cos_loss"], rel=1e-5)
    loss = DualViTokLoss(pixel_weight=0, perceptual_weight=0)
    forward = output(pictures["fake"], semantic, semantic_codebook=recorded["inputs"]["semantic_commit"])
    terms = loss.generator(pictures["real"], forward)
    assert terms["loss"].item() == pytest.approx(expected["total"], rel=1e-5)


def test_hinge_parity(recorded: dict[str, Any], parity_dir: Path) -> None:
    tensors = load_file(parity_dir / "patchgan_tiny.safetensors")
    real, fake = tensors["logits_real_eval"], tensors["logits_fake_eval"]
    expected = recorded["discriminator"]["l2@101"]["loss"] / 0.5
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(expected, rel=1e-5)
    expected = recorded["generator"]["l2@101"]["generator_adv_loss"]
    assert hinge_generator_loss(fake).item() == pytest.approx(expected, rel=1e-4)


def test_hinge_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 1.0, 0.0])
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(0.5 * (2.5 / 3 + 3 / 3))
    assert hinge_generator_loss(fake).item() == pytest.approx(2 / 3)


def test_the_gan_sets_in_at_its_step(recorded: dict[str, Any]) -> None:
    for weight, step, start, expected in recorded["adopt_weight"]:
        loss = DualViTokLoss(adversarial_weight=weight, adversarial_start=start)
        assert loss.adversarial_weight * loss.is_adversarial(step) == expected
    assert not DualViTokLoss(adversarial_weight=0, adversarial_start=0).is_adversarial(5)


def test_adaptive_weight_parity(
    parity_dir: Path, recorded: dict[str, Any], perceptual: Perceptual, discriminator: PatchDiscriminator
) -> None:
    config = json.loads((parity_dir / "dualvitok_tiny_config.json").read_text())
    model = build_official(config["vq_model"]["config"], config["qwen2vit_config"])
    weights = load_file(parity_dir / "dualvitok_tiny_weights.safetensors")
    model.load_state_dict({key: value.float() for key, value in weights.items()})
    model.eval().requires_grad_(False)
    model.pixel_decoder.conv_out.requires_grad_(True)
    images = load_file(parity_dir / "dualvitok_tiny_256x256_b2.safetensors")["image_u8"].float() / 127.5 - 1
    forward = model(images)
    loss = DualViTokLoss(
        "l2", semantic_weight=0, codebook_weight=0, adaptive_weight=True, adversarial_start=0
    )
    terms = loss.generator(
        images,
        forward,
        perceptual,
        discriminator(forward.reconstruction),
        model.pixel_decoder.last_layer,
    )
    expected = recorded["generator"]["adaptive@101(disc_start=0)"]
    total = terms["loss"] + terms["pixel_codebook_loss"]
    assert terms["pixel_loss"].item() == pytest.approx(expected["rec_loss"], rel=1e-4)
    assert total.item() == pytest.approx(expected["loss"], rel=1e-3)


def test_adaptive_weight_by_hand() -> None:
    layer = torch.tensor([3.0, 4.0], requires_grad=True)
    reconstruction, adversarial = 2 * layer.square().sum(), layer.sum()
    weight = adaptive_weight(reconstruction, adversarial, layer)
    assert weight.item() == pytest.approx(20 / (2**0.5 + 1e-4))
    assert not weight.requires_grad
    assert adaptive_weight(1e9 * reconstruction, adversarial, layer).item() == pytest.approx(1e4)
    assert adaptive_weight(reconstruction, 0 * adversarial, layer).item() == pytest.approx(1e4)


def test_weights_scale_their_terms() -> None:
    torch.manual_seed(0)
    images, fake = torch.rand(2, 2, 3, 8, 8) * 2 - 1
    semantic = (torch.randn(2, 5, 2, 2), torch.randn(2, 5, 2, 2))
    forward = output(fake, semantic, semantic_codebook=0.3, pixel_codebook=0.2)
    logits = torch.randn(2, 1, 2, 2)

    def perceptual(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().mean((1, 2, 3))

    loss = DualViTokLoss("l1", 2.0, 3.0, 0.5, 0, False, 5.0, 7.0)
    terms = loss.generator(images, forward, perceptual, logits)
    expected = (
        2 * (images - fake).abs().mean()
        + 3 * (images - fake).square().mean()
        - 0.5 * logits.mean()
        + 5 * (0.3 + 0.2)
        + 7 * (1 - torch.cosine_similarity(*semantic)).mean()
    )
    torch.testing.assert_close(terms["loss"], expected)
    assert set(terms) == {
        "loss",
        "pixel_loss",
        "perceptual_loss",
        "adversarial_loss",
        "semantic_codebook_loss",
        "pixel_codebook_loss",
        "semantic_loss",
    }


def test_pixel_losses_by_hand() -> None:
    images, fake = torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 0.5)
    for kind, expected in (("l1", 0.5), ("l2", 0.25), ("l1_l2", 0.75)):
        loss = DualViTokLoss(kind, perceptual_weight=0)
        assert loss.generator(images, output(fake))["pixel_loss"].item() == pytest.approx(expected)


def test_foreground_is_what_differs_from_the_border() -> None:
    pictures = torch.full((2, 3, 8, 8), -0.9)
    pictures[1] = 0.9
    pictures[0, :, 2:4, 2:4] = 0.5
    pictures[1, 2, 5, 5] = 0.0  # in one channel only
    pictures[1, :, 0, :3] = -1.0  # at the border, and less than half of it
    front = foreground(pictures)
    assert front.shape == (2, 1, 8, 8)
    assert front[0].nonzero()[:, 1:].tolist() == [[2, 2], [2, 3], [3, 2], [3, 3]]
    assert front[1].nonzero()[:, 1:].tolist() == [[0, 0], [0, 1], [0, 2], [5, 5]]


def test_the_foreground_counts_more() -> None:
    images = torch.zeros(1, 3, 8, 8)
    images[:, :, 2:4, 2:4] = 1.0
    behind, front = torch.zeros(1, 3, 8, 8), images.clone()
    behind[:, :, 6, 6] = front[:, :, 6, 6] = 0.5  # both wrong by 0.5 at one pixel behind
    plain, weighted = (DualViTokLoss(perceptual_weight=0, foreground_weight=w) for w in (1.0, 4.0))
    total = 60 + 4 * 4
    for ours, wrong in ((front, 0.5), (behind, 0.5 + 4 * 4)):
        found = weighted.generator(images, output(ours))["pixel_loss"].item()
        assert found == pytest.approx(wrong / total)
    assert plain.generator(images, output(front))["pixel_loss"].item() == pytest.approx(0.5 / 64)


def test_cosine_of_zero_vectors_is_finite() -> None:
    ours = torch.zeros(1, 4, 2, 2, requires_grad=True)
    target = torch.randn(1, 4, 2, 2, requires_grad=True)
    loss = cosine_loss(ours, target)
    loss.backward()
    assert loss.item() == 1
    assert torch.isfinite(ours.grad).all()
    assert target.grad is None


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="pixel_loss is 'huber'"):
        DualViTokLoss("huber")
    with pytest.raises(ValueError, match="semantic_weight is -1"):
        DualViTokLoss(semantic_weight=-1)
    images = torch.zeros(1, 3, 8, 8)
    with pytest.raises(ValueError, match="no perceptual network"):
        DualViTokLoss().generator(images, output(images))
    with pytest.raises(ValueError, match="last_layer"):
        DualViTokLoss(perceptual_weight=0, adaptive_weight=True).generator(
            images, output(images), fake_logits=torch.zeros(1)
        )
