"""Random numbers for batches: of one generator, or of each sample's own, whatever batch it comes in."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

_MASK = 2**64 - 1


class SampleDraws:
    """A generator for each sample of a batch.

    A sample draws the same numbers however the samples of a training step are dealt to devices and micro-batches, and
    after a resume. Numbers are drawn on the CPU, so they are the same on every kind of device too.

    Args:
        seed: of the run.
        numbers: of the samples (B,), as they count through the run.
    """

    def __init__(self, seed: int, numbers: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(_mixed(seed, number)) for number in numbers]


Source = torch.Generator | SampleDraws | None
"""Where random numbers come from; ``None`` is the device's own generator."""


def uniform(shape: Sequence[int], source: Source, device: torch.device) -> Tensor:
    """Numbers in [0, 1), fp32, of a shape that begins with the batch."""
    return _draw(partial(torch.rand, dtype=torch.float32), shape, source, device)


def normal(shape: Sequence[int], source: Source, device: torch.device) -> Tensor:
    """Standard normal numbers, fp32, of a shape that begins with the batch."""
    return _draw(partial(torch.randn, dtype=torch.float32), shape, source, device)


def integers(high: int, shape: Sequence[int], source: Source, device: torch.device) -> Tensor:
    """Integers in [0, high), int64, of a shape that begins with the batch."""

    def draw(shape: tuple[int, ...], **options: Any) -> Tensor:
        return torch.randint(high, shape, **options)

    return _draw(draw, shape, source, device)


def _draw(draw: Callable[..., Tensor], shape: Sequence[int], source: Source, device: torch.device) -> Tensor:
    if not isinstance(source, SampleDraws):
        where = device if source is None else source.device
        return draw(tuple(shape), generator=source, device=where).to(device)
    assert len(source.generators) == shape[0]
    drawn = [draw(tuple(shape[1:]), generator=generator, device="cpu") for generator in source.generators]
    return torch.stack(drawn).to(device)


def _mixed(seed: int, number: int) -> int:
    """32 bits of both (SplitMix64): torch's generator takes no more."""
    x = (seed * 0x9E3779B97F4A7C15 + (number + 1) * 0xD1342543DE82EF95) & _MASK
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = ((x ^ (x >> shift)) * factor) & _MASK
    return (x ^ (x >> 31)) >> 32
