"""Files of weights, read without running anything that is in them."""

import pickle
import struct
import zipfile
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

_BROKEN = (
    RuntimeError,
    EOFError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    ValueError,
    AssertionError,
    OverflowError,
    MemoryError,
    struct.error,
)
"""What torch raises at bytes that are no file of its own, or half of one."""


def load_plain(path: str | Path, stream: IO[bytes] | None = None) -> Any:
    """Read what ``torch.save`` wrote, onto the CPU: tensors, numbers, strings, and lists and dictionaries of these.

    Args:
        path: the file; from a new one tensors are read when they are used.
        stream: to read from instead; the path only names it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds anything else, which is not unpickled, or is broken.
    """
    if stream is None and not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: give the path of a file.")
    lazily = stream is None and zipfile.is_zipfile(path)  # older files can't be mapped
    try:
        return torch.load(stream or path, map_location="cpu", weights_only=True, mmap=lazily)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors and plain values, or is broken, and is not loaded, since that could run "
            "code: re-save its state dict alone."
        ) from error
    except _BROKEN as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} can't be read as a PyTorch file, it may be cut off: {reason}") from error


def load_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Read a ``.safetensors`` file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is broken, or its header says what is not so.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, *_BROKEN) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path} can't be read as safetensors, it may be cut off or another kind of file: {reason}"
        ) from error
