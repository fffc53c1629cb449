"""Published layouts load strictly and safely, and are written back."""

import pickle
from pathlib import Path

import pytest
import torch
from tiny import build_tiny

from illume_lightning.nn.checkpoints import load_dualvitok, read_state_dict, save_dualvitok
from illume_lightning.nn.dualvitok import DualViTok
from illume_lightning.nn.semantic import QwenVisionTower


@pytest.mark.parametrize("container", [None, "model", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_containers(tiny: DualViTok, tmp_path: Path, container: str | None, prefix: str) -> None:
    state = {prefix + key: value for key, value in tiny.state_dict().items()}
    content = state if container is None else {container: state, "steps": 3, "args": {"lr": 1e-4}}
    path = tmp_path / "pytorch_model.bin"
    torch.save(content, path)
    torch.manual_seed(1)
    other = build_tiny()
    load_dualvitok(other, path)
    assert all(
        torch.equal(a, b)
        for a, b in zip(tiny.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_ema_is_taken_only_on_request(tiny: DualViTok, tmp_path: Path) -> None:
    raw = tiny.state_dict()
    ema = {key: value + 1 for key, value in raw.items()}
    path = tmp_path / "ckpt.pt"
    torch.save({"model": raw, "ema": ema}, path)
    key = "pixel_quant_conv.weight"
    assert torch.equal(read_state_dict(path)[key], raw[key])
    assert torch.equal(read_state_dict(path, use_ema=True)[key], ema[key])
    torch.save({"model": raw}, path)
    with pytest.raises(ValueError, match="no 'ema' entry"):
        read_state_dict(path, use_ema=True)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_export_round_trip(tiny: DualViTok, tmp_path: Path, name: str) -> None:
    save_dualvitok(tiny, tmp_path / name)
    torch.manual_seed(1)
    other = build_tiny()
    load_dualvitok(other, tmp_path / name)
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    assert torch.equal(tiny.eval()(images).reconstruction, other.eval()(images).reconstruction)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_another_size_names_what_differs(tiny: DualViTok, tmp_path: Path) -> None:
    state = tiny.state_dict()
    state["pixel_quantizer.frozen_codebook"] = torch.zeros(7, 8)
    del state["pixel_quant_conv.bias"]
    path = tmp_path / "model.bin"
    torch.save(state, path)
    with pytest.raises(
        ValueError, match=r"\(7, 8\) in the file, \(96, 8\) in the model.*pixel_quant_conv.bias"
    ):
        load_dualvitok(tiny, path)


class Evil:
    """Unpickling this would run code."""

    def __reduce__(self) -> tuple:
        return print, ("executed",)


def test_pickled_code_is_never_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "evil.bin"
    torch.save({"model": Evil()}, path)
    with pytest.raises(ValueError, match="could run code"):
        read_state_dict(path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="evil.bin"):
        read_state_dict(path)
    assert "executed" not in capsys.readouterr().out


def test_truncated_and_missing_files(tiny: DualViTok, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    torch.save(tiny.state_dict(), path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cut off"):
        read_state_dict(path)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        read_state_dict(tmp_path / "other.bin")
    torch.save({"steps": 3}, path)
    with pytest.raises(ValueError, match="holds no state dict"):
        read_state_dict(path)


def test_vision_tower_loads_from_hugging_face_layout(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = QwenVisionTower(1, 32, 2, 48)
    source.save_pretrained(tmp_path)
    torch.manual_seed(1)
    loaded = QwenVisionTower(1, 32, 2, 48, pretrained=str(tmp_path))
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    assert torch.equal(source.features(images), loaded.features(images))
