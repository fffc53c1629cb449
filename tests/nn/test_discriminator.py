"""The PatchGAN equals the official release's, running statistics included."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from illume_lightning.nn.discriminator import PatchDiscriminator


@pytest.fixture
def recorded(parity_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(parity_dir / "patchgan_tiny.safetensors")


def test_parity(recorded: dict[str, torch.Tensor]) -> None:
    discriminator = PatchDiscriminator(width=16)
    state = {k.removeprefix("state_dict."): v for k, v in recorded.items() if k.startswith("state_dict.")}
    discriminator.load_state_dict(state)
    real, fake = (recorded[name].float() / 127.5 - 1 for name in ("real_u8", "fake_u8"))
    for mode in ("eval", "train"):
        discriminator.train(mode == "train")
        for name, images in (("real", real), ("fake", fake)):
            logits = discriminator(images)
            torch.testing.assert_close(logits, recorded[f"logits_{name}_{mode}"], rtol=1e-5, atol=1e-5)
    after = discriminator.state_dict()
    names = [k for k in recorded if k.startswith("after_train_real_then_fake.")]
    assert len(names) == 9
    for name in names:
        ours = after[name.removeprefix("after_train_real_then_fake.")]
        torch.testing.assert_close(ours, recorded[name], rtol=1e-5, atol=1e-6)


def test_full_size() -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator()
    assert sum(p.numel() for p in discriminator.parameters()) == 2_765_633
    assert discriminator(torch.zeros(2, 3, 256, 256)).shape == (2, 1, 30, 30)
    convolution, norm = discriminator.main[8], discriminator.main[9]
    assert convolution.weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert norm.weight.mean().item() == pytest.approx(1.0, abs=0.01)
    assert norm.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert norm.bias.abs().max() == 0


def test_width_stops_at_eight_times() -> None:
    widths = [m.out_channels for m in PatchDiscriminator(1, 4, 5).main if isinstance(m, torch.nn.Conv2d)]
    assert widths == [4, 8, 16, 32, 32, 32, 1]


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="num_layers is 0"):
        PatchDiscriminator(num_layers=0)
