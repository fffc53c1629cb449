"""Checkpoints that many devices wrote together: a folder with a file of each (FSDP2).

Written by Lightning's ModelParallelStrategy with ``save_distributed_checkpoint``. Here they are read in one process,
without those devices.
"""

import tempfile
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from illume_lightning.nn.plain_file import load_plain
from illume_lightning.nn.sharded_metadata import read_metadata

REST = "meta.pt"
"""Lightning's file of everything that is neither weight nor optimizer state; it is written last."""

WEIGHTS = "state_dict."


def is_sharded(path: str | Path) -> bool:
    """Whether this is the folder of a sharded checkpoint, and whole."""
    return (Path(path) / REST).is_file() and (Path(path) / ".metadata").is_file()


def hollow_weights(folder: str | Path) -> dict[str, Tensor]:
    """Names, shapes and types of the weights, on the meta device."""
    metadata = read_metadata(folder).state_dict_metadata
    return {
        name.removeprefix(WEIGHTS): torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in metadata.items()
        if name.startswith(WEIGHTS) and isinstance(entry, TensorStorageMetadata)
    }


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """All weights, as names in a Lightning checkpoint's ``state_dict``, in the memory of this process."""
    state = {
        WEIGHTS + name: torch.empty_like(hollow, device="cpu")
        for name, hollow in hollow_weights(folder).items()
    }
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return {name.removeprefix(WEIGHTS): weights for name, weights in state.items()}


def read_rest(checkpoint: str | Path) -> dict[str, Any]:
    """Entries of a Lightning checkpoint, a file or a folder; of a folder's those that are no weights.

    Raises:
        ValueError: as ``load_plain``.
    """
    file = Path(checkpoint) / REST if is_sharded(checkpoint) else checkpoint
    return load_plain(file)


def require_file(checkpoint: str | Path, what: str) -> None:
    """Refuse a sharded checkpoint.

    Args:
        checkpoint: a file or a folder.
        what: needs a file.

    Raises:
        ValueError: names the command that makes one file of it.
    """
    if is_sharded(checkpoint):
        raise ValueError(
            f"{checkpoint} is a folder that FSDP2's devices wrote, and {what} takes a file: make one of it with "
            f"`illume consolidate {checkpoint} {checkpoint}`"
        )


def consolidate(folder: str | Path, file: str | Path) -> None:
    """Write one file of a sharded checkpoint, from which any strategy on any number of devices goes on.

    Needs the memory of the whole checkpoint, optimizer state included.

    Args:
        folder: the checkpoint.
        file: to write; where it is the folder itself, that is kept beside it with ``.sharded`` behind its name.

    Raises:
        FileNotFoundError: if the folder is no sharded checkpoint, or not whole.
        ValueError: if more than tensors and plain values is in it.
    """
    folder, file = Path(folder), Path(file)
    if not is_sharded(folder):
        raise FileNotFoundError(
            f"{folder} is no sharded checkpoint: it has no {REST} and .metadata; give a folder that training with "
            "FSDP2 wrote, such as RUN/checkpoints/last.ckpt"
        )
    read_metadata(folder)  # torch unpickles what is in it
    partial = file.with_name(file.name + ".partial")
    with tempfile.TemporaryDirectory(dir=file.parent) as between:
        dcp_to_torch_save(folder, between + "/tensors")
        content = torch.load(between + "/tensors", map_location="cpu", mmap=True, weights_only=True)
        names = sorted(
            (name for name in content if name.startswith("optimizer_")), key=lambda name: int(name[10:])
        )
        rest = load_plain(folder / REST)
        states = [_numbered(content[name]) for name in names]
        torch.save({**rest, "state_dict": content["state_dict"], "optimizer_states": states}, partial)
    if file == folder:
        folder.rename(folder.with_name(folder.name + ".sharded"))
    partial.replace(file)


def _numbered(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state with numbers for the names of parameters, as optimizers have it."""
    names = chain.from_iterable(group["params"] for group in state["param_groups"])
    numbers = {name: number for number, name in enumerate(names)}
    groups = [
        {**group, "params": [numbers[name] for name in group["params"]]} for group in state["param_groups"]
    ]
    return {
        "state": {numbers[name]: values for name, values in state["state"].items()},
        "param_groups": groups,
    }
