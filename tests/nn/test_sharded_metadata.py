"""Folders of sharded checkpoints: nothing in them runs, and nothing outside of them is read."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hostile import Evil, payloads

from illume_lightning.nn.checkpoints import read_state_dict
from illume_lightning.nn.sharded_checkpoint import REST, consolidate, hollow_weights, read_weights
from illume_lightning.nn.sharded_metadata import read_metadata

READERS: tuple[Callable[[Path], Any], ...] = (
    read_metadata,
    hollow_weights,
    read_weights,
    read_state_dict,
    lambda folder: consolidate(folder, folder.with_name("one.ckpt")),
)
GROUP = {"lr": 0.1, "betas": (0.9, 0.99), "fused": None, "params": ["a"]}


pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "last.ckpt", GROUP)


def write(folder: Path, group: dict[str, Any]) -> Path:
    """A folder as FSDP2 leaves it."""
    optimizer = {"state": {"a": {"step": torch.tensor(3.0)}}, "param_groups": [group]}
    state = {"state_dict": {"model.a": torch.arange(3.0)}, "optimizer_0": optimizer}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    torch.save({"global_step": 3}, folder / REST)
    return folder


def refused(folder: Path, expected: str) -> None:
    for read in READERS:
        with pytest.raises((ValueError, FileNotFoundError), match=expected) as error:
            read(folder)
        assert "\n" not in str(error.value)


def test_a_folder_is_read(folder: Path) -> None:
    assert torch.equal(read_weights(folder)["model.a"], torch.arange(3.0))
    consolidate(folder, folder.with_name("one.ckpt"))
    found = torch.load(folder.with_name("one.ckpt"), weights_only=True)
    assert found["optimizer_states"][0]["param_groups"] == [GROUP | {"params": [0]}]


def test_nothing_in_metadata_runs(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    good = pickle.loads((folder / ".metadata").read_bytes())
    for evil in payloads(mark).values():
        good.planner_data = {"a": evil}
        for content in (evil, good):
            (folder / ".metadata").write_bytes(pickle.dumps(content))
            refused(folder, "could run code")
            assert not mark.exists()


def test_nothing_in_a_value_runs(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    folder = write(tmp_path / "last.ckpt", GROUP | {"lr": Evil(exec, f"open({str(mark)!r}, 'w')")})
    refused(folder, r"optimizer_0.param_groups.0.lr.*could run code")
    assert not mark.exists()


def test_nothing_outside_is_read(folder: Path) -> None:
    (folder.parent / "secret").write_bytes(bytes(5000))
    good = (folder / ".metadata").read_bytes()
    for name in ("../secret", str(folder.parent / "secret"), "", ".."):
        metadata = pickle.loads(good)
        for place in metadata.storage_data.values():
            object.__setattr__(place, "relative_path", name)
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        refused(folder, "which is not in the folder")


@pytest.mark.parametrize(
    ("field", "value"), [("offset", -1), ("length", 2**70), ("offset", "0"), ("length", None)]
)
def test_places_lie_in_their_file(folder: Path, field: str, value: Any) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    object.__setattr__(next(iter(metadata.storage_data.values())), field, value)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(folder, "bytes from")


def test_broken_folders_are_named(folder: Path) -> None:
    good = (folder / ".metadata").read_bytes()
    for content in (b"", good[:100], good[:-20], b"\x80\x05N.", pickle.dumps({"a": 1}), b"not a pickle"):
        (folder / ".metadata").write_bytes(content)
        refused(folder, r"last.ckpt")
    (folder / ".metadata").write_bytes(good)
    (folder / "__0_0.distcp").unlink()
    refused(folder, "is not whole")
