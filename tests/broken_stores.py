"""Stores as damage or older versions leave them."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from illume_lightning.data.store import Store


def edit_manifest(store: Path, **entries: Any) -> None:
    """Change entries of a store's manifest; None removes one."""
    path = store / "manifest.json"
    content = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def forget_files(store: Path) -> None:
    """Make a store one of an older version: nothing but its chunks has a checksum."""
    edit_manifest(store, files=None)


def flip(path: Path, place: int, mask: int = 1) -> None:
    """Flip bits of one byte; the place counts from the end if it is negative."""
    data = bytearray(path.read_bytes())
    data[place] ^= mask
    path.write_bytes(data)


def damage(folder: str | Path, *indices: int) -> None:
    """Flip one bit in the middle of each of these records of a store."""
    store = Store(folder)
    for index in indices:
        chunk = int(store.chunk_ids[index])
        path = store.path / store.manifest.chunks[chunk].filename
        within = index - int((store.chunk_ids < chunk).sum())
        begin, end = np.frombuffer(path.read_bytes(), "<u4", 2, 4 * (1 + within)).tolist()
        flip(path, (begin + end) // 2)
