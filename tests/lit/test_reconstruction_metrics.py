"""Reconstruction metrics: ranges stated, values known."""

import pytest
import torch
from tiny import build_tiny
from torch import Tensor, nn

from illume_lightning.lit.reconstruction_metrics import PictureMetrics, ReconstructionMetrics


class TinyFeatures(nn.Module):
    """Four channel statistics instead of the Inception network."""

    num_features = 4

    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        x = images.double() / 255
        return torch.cat([x.mean((2, 3)), x.std((1, 2, 3))[:, None]], dim=1)


@pytest.fixture
def batch() -> tuple[Tensor, object]:
    torch.manual_seed(0)
    images = torch.rand(8, 3, 64, 64) * 2 - 1
    return images, build_tiny().eval()(images)


def metrics(**options: nn.Module) -> ReconstructionMetrics:
    return ReconstructionMetrics({"semantic": 64, "pixel": 96}, **options)


def test_a_known_error_gives_a_known_psnr(batch: tuple) -> None:
    images, output = batch
    measured = metrics()
    # A tenth in [-1, 1] is a twentieth in [0, 1].
    measured.update(images, images + 0.1, output)
    values = measured.compute()
    assert values["psnr"] == pytest.approx(26.0206, abs=1e-3)
    assert 0.9 < values["ssim"] < 1
    assert "lpips" not in values
    assert "rfid" not in values


def test_perfect_reconstruction(batch: tuple) -> None:
    images, output = batch
    measured = metrics(fid_features=TinyFeatures())
    measured.update(images, images.clone(), output)
    values = measured.compute()
    assert values["ssim"] == pytest.approx(1, abs=1e-5)
    assert values["frechet_tinyfeatures"] == pytest.approx(0, abs=1e-4)


def test_low_precision_leaves_the_values_alone() -> None:
    """Smooth pictures, whose variances are small beside their means."""
    torch.manual_seed(0)
    images = torch.linspace(0.8, 0.9, 64).expand(4, 3, 64, 64) + 0.01 * torch.randn(4, 3, 64, 64)
    noise = 0.01 * torch.randn(4, 3, 64, 64)
    values = []
    for enabled in (False, True):
        measured = PictureMetrics()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            measured.update(images, images + noise)
        values.append(measured.compute())
    assert values[0]["ssim"] < 0.99
    assert values[0] == values[1]


def test_the_distance_is_named_after_its_network_and_grows(batch: tuple) -> None:
    images, output = batch
    distances = []
    for shift in (0.1, 0.4):
        measured = metrics(fid_features=TinyFeatures())
        measured.update(images, (images + shift).clamp(-1, 1), output)
        distances.append(float(measured.compute()["frechet_tinyfeatures"]))
    assert 0 < distances[0] < distances[1]


def test_lpips_is_averaged_over_pictures(batch: tuple) -> None:
    images, output = batch

    class Distance(nn.Module):
        def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
            return (reconstruction - images).abs().mean((1, 2, 3))

    measured = metrics(perceptual=Distance())
    measured.update(images[:6], images[:6] + 0.2, output)
    measured.update(images[6:], images[6:], output)
    assert measured.compute()["lpips"] == pytest.approx(0.2 * 6 / 8, abs=1e-5)
    assert not measured.state_dict(), "nothing of it belongs in a checkpoint"


def test_codebook_health_of_held_out_data(batch: tuple) -> None:
    images, output = batch
    measured = metrics()
    measured.update(images, images, output)
    values = measured.compute()
    distinct = output.encoded.codes.pixel.unique().numel()
    assert values["pixel_usage"] == pytest.approx(distinct / 96)
    assert values["pixel_dead"] == 96 - distinct
    assert 1 <= values["pixel_perplexity"] <= distinct + 1e-3
