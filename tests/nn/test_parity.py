"""Every recorded tensor of the official model is reproduced."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from illume_lightning.nn.checkpoints import build_official
from illume_lightning.nn.discriminator import PatchDiscriminator
from illume_lightning.nn.parity import run, table


def test_every_fixture_is_reproduced(parity_dir: Path) -> None:
    checks = run(parity_dir)
    missed = [check for check in checks if not check.passed]
    assert not missed, table(missed)
    covered = {check.fixture for check in checks}
    for path in parity_dir.glob("dualvitok_tiny_*x*.safetensors"):
        assert path.name in covered, f"{path.name} was not compared"
    assert {
        "mllm_tiny_batch_anyres.safetensors",
        "mllm_tiny_batch_anyres_grads.json",
        "mllm_tiny_generation.json",
        "mllm_tiny_generation.safetensors",
        "noise_injection.safetensors",
        "patchgan_tiny.safetensors",
        "simvq_98304.safetensors",
        "simvq_98304_grads.safetensors",
        "simvq_rotation.safetensors",
    } <= covered


def test_a_wrong_weight_is_noticed(parity_dir: Path, tmp_path: Path) -> None:
    for name in ("dualvitok_tiny_weights.safetensors", "dualvitok_tiny_config.json"):
        shutil.copy(parity_dir / name, tmp_path / name)
    shutil.copy(parity_dir / "dualvitok_tiny_256x256.safetensors", tmp_path)
    weights = load_file(parity_dir / "dualvitok_tiny_weights.safetensors")
    weights["pixel_decoder.conv_out.bias"] = weights["pixel_decoder.conv_out.bias"] + 0.01
    (tmp_path / "dualvitok_tiny_weights.safetensors").unlink()
    save_file(weights, tmp_path / "dualvitok_tiny_weights.safetensors")
    missed = {check.quantity for check in run(tmp_path) if not check.passed}
    assert missed == {"reconstruction", "reconstruction from recorded features"}


def test_a_wrong_weight_of_the_mllm_is_noticed(parity_dir: Path, tmp_path: Path) -> None:
    names = ("mllm_tiny_config.json", "mllm_tiny_batch_anyres.safetensors", "dualvitok_tiny_config.json")
    for name in (*names, "dualvitok_tiny_weights.safetensors"):
        shutil.copy(parity_dir / name, tmp_path / name)
    weights = load_file(parity_dir / "mllm_tiny_weights.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.01
    save_file(weights, tmp_path / "mllm_tiny_weights.safetensors")
    passed = {check.quantity: check.passed for check in run(tmp_path)}
    missed = {quantity for quantity, is_passed in passed.items() if not is_passed}
    assert missed == {"logits_supervised", "logits_last", "loss"}
    assert passed["projected"] and passed["inputs_embeds"]


@pytest.fixture
def generation_dir(parity_dir: Path, tmp_path: Path) -> Path:
    """The fixtures of generation, and of the model that it needs."""
    for name in ("config.json", "weights.safetensors"):
        shutil.copy(parity_dir / f"dualvitok_tiny_{name}", tmp_path)
        shutil.copy(parity_dir / f"mllm_tiny_{name}", tmp_path)
    for name in ("generation.json", "generation.safetensors", "batch_anyres.safetensors"):
        shutil.copy(parity_dir / f"mllm_tiny_{name}", tmp_path)
    return tmp_path


def test_a_wrong_recorded_generation_is_noticed(generation_dir: Path) -> None:
    path = generation_dir / "mllm_tiny_generation.json"
    recorded = json.loads(path.read_text())
    recorded["trace"]["scripted_mask_trace"]["steps"][5]["allowed"][0][1] -= 1
    case = recorded["trace"]["apply_sampling"]["cases"][1]
    row = case["out"][0]
    row[row.index(None)] = min(score for score in row if score is not None)
    first, second = recorded["generation"]["t2i_cfg2"], recorded["generation"]["edit_cfg1p5"]
    first["output_ids"][2] += 1
    second["steps"][0]["allowed"][0][1] += 1
    path.write_text(json.dumps(recorded))
    missed = {check.quantity for check in run(generation_dir) if not check.passed}
    assert missed == {
        "scripted_mask_trace",
        f"apply_sampling {case['temp']:g} {case['top_k']} {case['top_p']:g}: finite",
        f"apply_sampling {case['temp']:g} {case['top_k']} {case['top_p']:g}",
        "t2i_cfg2.output_ids",
        "t2i_cfg2.raw_cond_logits",
        "t2i_cfg2.processed_scores",
        "edit_cfg1p5.allowed",
        "edit_cfg1p5.processed_scores",
        "edit_cfg1p5.processed_scores: finite",
    }


def test_a_missing_picture_of_a_generation_is_named(generation_dir: Path) -> None:
    (generation_dir / "mllm_tiny_batch_anyres.safetensors").unlink()
    with pytest.raises(ValueError, match="a picture of 256 x 320 .* no mllm_tiny_batch"):
        run(generation_dir)


def test_every_official_key_shape_and_dtype_at_full_size(parity_dir: Path) -> None:
    recorded = json.loads((parity_dir / "dualvitok_full_keys.json").read_text())
    with torch.device("meta"):
        model = build_official()
        discriminator = PatchDiscriminator()
    official = recorded["dualvitok_anyres_max512"]["keys"]
    parameters = dict(model.named_parameters())
    ours = {
        key: {
            "shape": list(value.shape),
            "dtype": str(value.dtype).removeprefix("torch."),
            "kind": "param" if key in parameters else "buffer",
            "requires_grad": parameters[key].requires_grad if key in parameters else False,
        }
        for key, value in model.state_dict().items()
    }
    assert ours == {
        key: {**value, "requires_grad": bool(value["requires_grad"])} for key, value in official.items()
    }
    theirs = {
        key.removeprefix("discriminator."): value["shape"]
        for key, value in recorded["vq_loss"]["keys"].items()
        if key.startswith("discriminator.")
    }
    assert theirs == {key: list(value.shape) for key, value in discriminator.state_dict().items()}


def test_missing_folder_and_device_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        run(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no parity fixture"):
        run(tmp_path)
    with pytest.raises(ValueError, match="device 'warp:3' can't be used here"):
        run(tmp_path, "warp:3")
