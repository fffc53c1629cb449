"""Files of weights: nothing in them runs, and whatever is broken in them is one ValueError."""

import io
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from diffusers import AutoencoderKL
from hostile import hostile_files, payloads
from safetensors.torch import save_file
from torch import nn

from illume_lightning.nn.checkpoints import read_state_dict
from illume_lightning.nn.latents import VAELatents
from illume_lightning.nn.mllm_checkpoints import _read_folder
from illume_lightning.nn.plain_file import load_plain, load_safetensors
from illume_lightning.nn.semantic import QwenVisionTower


class Published(NamedTuple):
    """Something that a library of Hugging Face reads."""

    made: nn.Module
    read: Callable[[str], object]
    name: str


@pytest.mark.parametrize(
    "published",
    [
        Published(QwenVisionTower(1, 32, 2, 48), lambda path: QwenVisionTower(1, 32, 2, 48, path), "{}model"),
        Published(AutoencoderKL(block_out_channels=(8,), norm_num_groups=4), VAELatents, "diffusion_{}model"),
    ],
    ids=["tower", "vae"],
)
@pytest.mark.filterwarnings("ignore")
def test_nothing_in_a_published_folder_runs(published: Published, tmp_path: Path) -> None:
    folder, mark = tmp_path / "published", tmp_path / "mark"
    published.made.save_pretrained(folder)
    (safe,) = folder.glob("*.safetensors")
    safe.unlink()
    state = published.made.state_dict()
    for evil in payloads(mark).values():
        torch.save(state | {"evil": evil}, folder / (published.name.format("pytorch_") + ".bin"))
        with pytest.raises((ValueError, OSError), match=str(folder)) as error:
            published.read(str(folder))
        assert not mark.exists() and "\n" not in str(error.value).strip()
    safe.write_bytes(b"\xff" * 100)
    with pytest.raises((ValueError, OSError), match=str(folder)):
        published.read(str(folder))


STATE = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_nothing_in_a_file_runs(tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "evil.ckpt"
    files = hostile_files(mark)
    assert len(files) == 84
    for name, content in files.items():
        path.write_bytes(content)
        for read in (load_plain, read_state_dict):
            with pytest.raises(ValueError, match="evil.ckpt") as error:
                read(path)
            assert not mark.exists(), name
            assert "\n" not in str(error.value), name
    with pytest.raises(ValueError, match="value of lr"):
        load_plain("value of lr", io.BytesIO(next(iter(files.values()))))


@pytest.mark.parametrize("is_zip", [True, False])
def test_what_is_plain_is_read(tmp_path: Path, is_zip: bool) -> None:
    content = {
        "state_dict": STATE,
        "step": 3,
        "name": "run",
        "betas": (0.9, 0.99),
        "none": None,
        "flags": [True],
    }
    torch.save(content, tmp_path / "plain.ckpt", _use_new_zipfile_serialization=is_zip)
    found = load_plain(tmp_path / "plain.ckpt")
    assert all(torch.equal(found["state_dict"][key], value) for key, value in STATE.items())
    assert {**found, "state_dict": 0} == {**content, "state_dict": 0}
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_plain(tmp_path / "gone.ckpt")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("is_zip", [True, False])
def test_broken_files_are_value_errors(tmp_path: Path, is_zip: bool) -> None:
    torch.save(STATE | {"text": "x" * 50}, tmp_path / "good", _use_new_zipfile_serialization=is_zip)
    good, path, draw = (tmp_path / "good").read_bytes(), tmp_path / "broken.bin", random.Random(0)
    complaints = []
    for _ in range(150):
        content = bytearray(good[: draw.randrange(len(good))] if draw.random() < 0.3 else good)
        for _ in range(draw.randrange(6) if content else 0):
            content[draw.randrange(min(len(content), 800))] = draw.randrange(256)
        path.write_bytes(content)
        try:
            load_plain(path)
        except ValueError as error:
            complaints.append(str(error))
    assert len(complaints) > 50
    assert all(str(path) in complaint and "\n" not in complaint for complaint in complaints)


def test_headers_of_safetensors_that_lie(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    headers = [
        {"a": entry | {"shape": [2**40]}},
        {"a": entry | {"data_offsets": [0, 2**50]}},
        {"a": entry | {"data_offsets": [4, 0]}},
        {"a": entry | {"data_offsets": [-8, 0]}},
        {"a": entry | {"dtype": "OBJECT"}},
        {"a": entry, "b": entry},
        {"a": "os.system"},
        ["a"],
    ]
    contents = [struct.pack("<Q", len(text := json.dumps(h).encode())) + text + bytes(8) for h in headers]
    contents += [b"", b"\xff" * 8, struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 2) + b"{"]
    for content in contents:
        path.write_bytes(content)
        for read in (load_safetensors, read_state_dict):
            with pytest.raises(ValueError, match=r"model.safetensors can't be read as safetensors") as error:
                read(path)
            assert "\n" not in str(error.value)
        with pytest.raises(ValueError, match=r"can't be read as safetensors"):
            _read_folder(tmp_path)
    save_file(STATE, path)
    assert load_safetensors(path).keys() == STATE.keys()


@pytest.mark.parametrize(
    "index",
    [
        "[]",
        "{",
        '{"weight_map": 3}',
        '{"weight_map": {"a": "../secret.safetensors"}}',
        '{"weight_map": {"a": "/etc/a"}}',
    ],
)
def test_an_index_stays_in_its_folder(tmp_path: Path, index: str) -> None:
    (tmp_path / "model").mkdir()
    save_file(STATE, tmp_path / "secret.safetensors")
    (tmp_path / "model" / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"model.safetensors.index.json"):
        _read_folder(tmp_path / "model")
