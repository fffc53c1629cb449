"""Hashes of weights: equal where weights are equal bit for bit."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

_DIGITS = 16


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """One hash of all tensors with their names, shapes and types (sha256, hexadecimal)."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(_content(value))
    return digest.hexdigest()


def tensor_digests(state: Mapping[str, Tensor]) -> dict[str, str]:
    """A hash of each tensor with its shape and type (16 hexadecimal digits)."""
    return {name: weights_digest({"": value})[:_DIGITS] for name, value in sorted(state.items())}


def _content(value: Tensor) -> memoryview:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
