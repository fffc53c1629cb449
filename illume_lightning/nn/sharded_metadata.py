"""What a sharded checkpoint says of itself, read without running anything that is in it.

torch unpickles two things of such a folder: the file ``.metadata``, and each value that is no tensor (the numbers of
optimizers' groups). Both are read here first, and only where they are what torch writes is the folder left to it.
"""

import io
import os
import pickle
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from illume_lightning.nn.plain_file import load_plain

FILE = ".metadata"

_CLASSES: Mapping[tuple[str, str], Any] = {
    (kind.__module__, kind.__qualname__): kind
    for kind in (
        *(metadata.Metadata, metadata.MetadataIndex, metadata.StorageMeta, metadata._MEM_FORMAT_ENCODING),
        *(metadata.TensorStorageMetadata, metadata.BytesStorageMetadata, metadata.ChunkStorageMetadata),
        *(metadata.TensorProperties, filesystem._StorageInfo, torch.serialization._get_layout, torch.Size),
    )
} | {
    (module, name): kind
    for module in ("pathlib", "pathlib._local")
    for name, kind in {"PosixPath": PurePosixPath, "WindowsPath": PureWindowsPath}.items()
}


def read_metadata(folder: str | Path) -> Metadata:
    """Tensors and values of a sharded checkpoint, all of which may be loaded.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if something in the folder is not what torch writes, or points outside of it.
    """
    folder = Path(folder)
    content = (folder / FILE).read_bytes()
    try:
        found = _Unpickler(io.BytesIO(content)).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / FILE} is not loaded: it is broken, or no metadata of a sharded checkpoint but something that "
            f"could run code ({error}); take the folder from where it was trained"
        ) from error
    entries = found.state_dict_metadata if type(found) is Metadata else None
    places = found.storage_data if type(found) is Metadata else None
    if not isinstance(entries, dict) or not isinstance(places, dict):
        raise ValueError(f"{folder / FILE} is no metadata of a sharded checkpoint, it is broken")
    for index, place in places.items():
        entry = entries.get(getattr(index, "fqn", ""))
        if type(entry) is BytesStorageMetadata:
            _check_value(folder, index.fqn, place)
        elif type(entry) is not TensorStorageMetadata:
            raise ValueError(f"{folder / FILE} is broken: it has nothing about {index!s:.80}")
        _file(folder, place)
    return found


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CLASSES:
            return _CLASSES[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _check_value(folder: Path, name: str, place: Any) -> None:
    """Refuse a value whose bytes are more than plain."""
    file = _file(folder, place)
    with file.open("rb") as stream:
        stream.seek(place.offset)
        load_plain(f"{file} ({name})", io.BytesIO(stream.read(place.length)))


def _file(folder: Path, place: Any) -> Path:
    """The file of an entry, which lies in the folder itself."""
    name = getattr(place, "relative_path", None)
    offset, length = getattr(place, "offset", None), getattr(place, "length", None)
    if not isinstance(name, str) or os.path.basename(name) != name or name in ("", ".", ".."):
        raise ValueError(
            f"{folder / FILE} is not loaded: it names the file {name!r}, which is not in the folder"
        )
    if getattr(place, "transform_descriptors", None):
        raise ValueError(f"{folder / FILE} is not loaded: {name} is compressed, which nothing here writes")
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder} is not whole: {name} is missing")
    size = (folder / name).stat().st_size
    if not (isinstance(offset, int) and isinstance(length, int) and 0 <= offset <= offset + length <= size):
        raise ValueError(f"{folder} is broken: {name} has no {length} bytes from {offset} on")
    return folder / name
