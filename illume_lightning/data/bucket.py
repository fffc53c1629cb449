"""Buckets: which pictures of a phase share a size, so that a batch needs no padding (paper 3.4)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from illume_lightning.data.schedule import Phase
from illume_lightning.resolution import (
    MAX_CROP,
    Size,
    any_resolution,
    nearest_ratio,
    ratio_sizes,
)


@dataclass(frozen=True)
class Shapes:
    """The distinct picture sizes of a dataset of N pictures.

    Args:
        sizes: (U, 2), rows of height and width in pixels.
        of_sample: (N,), row of `sizes` that each picture has.
        counts: (U,), pictures of each size.
    """

    sizes: np.ndarray
    of_sample: np.ndarray
    counts: np.ndarray

    @staticmethod
    def of(sizes: np.ndarray) -> "Shapes":
        """Find the distinct rows of (N, 2)."""
        codes = sizes[:, 0].astype(np.int64) << 32 | sizes[:, 1]
        distinct, of_sample, counts = np.unique(codes, return_inverse=True, return_counts=True)
        rows = np.stack([distinct >> 32, distinct & 0xFFFFFFFF], axis=1)
        return Shapes(rows, of_sample.astype(np.int32), counts)


@dataclass(frozen=True)
class Buckets:
    """The buckets of one phase over D datasets.

    Args:
        sizes: size of each of the b buckets, sorted.
        of_shape: for each dataset (U,), the bucket of each distinct picture size; -1 is left out.
        counts: (D, b), pictures of each dataset in each bucket.
        num_excluded: (D,), pictures that are left out because they would be cropped too much.
        num_merged: (D,), pictures that went to a neighbour of their own, too small bucket.
    """

    sizes: tuple[Size, ...]
    of_shape: tuple[np.ndarray, ...]
    counts: np.ndarray
    num_excluded: np.ndarray
    num_merged: np.ndarray


def assign_buckets(phase: Phase, datasets: Sequence[Shapes], merge: bool = True) -> Buckets:
    """Put every picture of a phase into the bucket of its size.

    Buckets with fewer pictures than a training step has samples are merged into their neighbours, see
    `merge_small_buckets`; where samples can't change their size, `merge` is off.
    """
    target = partial(target_size, phase, ratio_sizes(phase.side, phase.size_step))
    targets = [[target(h, w) for h, w in shapes.sizes.tolist()] for shapes in datasets]
    sizes = sorted({size for row in targets for size in row if size is not None})
    number = {size: index for index, size in enumerate(sizes)} | {None: -1}
    own = [np.array([number[size] for size in row], dtype=np.int32) for row in targets]

    counts = np.zeros((len(datasets), len(sizes)), dtype=np.int64)
    lows, highs = np.full(len(sizes), np.inf), np.zeros(len(sizes))
    for row, shapes, bucket in zip(counts, datasets, own, strict=True):
        kept = bucket >= 0
        np.add.at(row, bucket[kept], shapes.counts[kept])
        aspects = shapes.sizes[kept, 1] / shapes.sizes[kept, 0]
        np.minimum.at(lows, bucket[kept], aspects)
        np.maximum.at(highs, bucket[kept], aspects)

    merged = np.arange(len(sizes))
    if merge:
        merged = merge_small_buckets(sizes, counts.sum(axis=0), lows, highs, phase.batch_size)
    survivors = np.unique(merged)
    renumber = np.append(np.searchsorted(survivors, merged), -1)  # entry -1 keeps what is left out
    new_counts = np.stack([counts[:, merged == bucket].sum(axis=1) for bucket in survivors], axis=1)
    return Buckets(
        sizes=tuple(sizes[bucket] for bucket in survivors),
        of_shape=tuple(renumber[bucket] for bucket in own),
        counts=new_counts,
        num_excluded=np.array([shapes.counts.sum() for shapes in datasets]) - new_counts.sum(axis=1),
        num_merged=counts[:, merged != np.arange(len(sizes))].sum(axis=1),
    )


def merge_small_buckets(
    sizes: Sequence[Size], counts: np.ndarray, lows: np.ndarray, highs: np.ndarray, minimum: int
) -> np.ndarray:
    """Merge buckets that could not fill a batch into the most similar ones (paper 3.4).

    The smallest bucket goes first, and goes to the bucket nearest in log height and log width among those
    that crop none of its pictures by more than 20 %. A bucket without such a neighbour stays as it is.

    Args:
        sizes: of b buckets.
        counts: (b,), pictures in each.
        lows: (b,), smallest width / height of the pictures in each.
        highs: (b,), largest width / height of the pictures in each.
        minimum: buckets with fewer pictures are merged.

    Returns:
        (b,), the bucket that each bucket's pictures end up in.
    """
    merged = np.arange(len(sizes))
    if len(sizes) < 2:
        return merged
    counts, lows, highs = counts.copy(), lows.copy(), highs.copy()
    logs = np.log(np.array(sizes, dtype=np.float64))
    aspects = np.exp(logs[:, 1] - logs[:, 0])
    alive = np.ones(len(sizes), dtype=bool)
    movable = alive.copy()
    while True:
        small = np.flatnonzero(movable & (counts < minimum))
        if not len(small):
            return merged
        bucket = small[np.argmin(counts[small])]
        # The picture that loses most is one of the two of extreme aspect ratio.
        extremes = np.array([[lows[bucket]], [highs[bucket]]])
        kept = (np.minimum(extremes, aspects) / np.maximum(extremes, aspects)).min(axis=0)
        allowed = alive & (1 - kept <= MAX_CROP)
        allowed[bucket] = False
        movable[bucket] = False
        if not allowed.any():
            continue
        distance = np.abs(logs - logs[bucket]).sum(axis=1)
        neighbour = np.argmin(np.where(allowed, distance, np.inf))
        counts[neighbour] += counts[bucket]
        lows[neighbour] = min(lows[neighbour], lows[bucket])
        highs[neighbour] = max(highs[neighbour], highs[bucket])
        alive[bucket] = False
        merged[merged == bucket] = neighbour


def target_size(phase: Phase, ratios: Sequence[Size], height: int, width: int) -> Size | None:
    """Size of a picture in a phase, or none where it would be cropped too much."""
    if phase.mode == "fixed":
        return phase.side, phase.side
    if phase.mode == "any_resolution":
        return any_resolution(height, width, phase.side)
    size, cropped = nearest_ratio(height, width, ratios)
    return size if cropped <= MAX_CROP else None
