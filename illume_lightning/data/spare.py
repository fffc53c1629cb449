"""What is read in place of a damaged record: a choice that any number of devices and any resumed run repeats."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch

from illume_lightning.data.store import DamagedRecord

log = logging.getLogger(__name__)

_MOST_TRIES = 64
_KEY = 0x5A12E  # keeps these random numbers apart from those of the plan

_Content = TypeVar("_Content")


class DamageLog:
    """Names every damaged record of a run once, and ends the run when there are too many.

    Args:
        most: records until then.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.lines: set[str] = set()
        """What was found in this process, a line for each record."""

    def add(self, lines: Iterable[str]) -> None:
        """Note what was found in a batch.

        Raises:
            DamagedRecord: if there are more records than may be.
        """
        for line in sorted({*lines} - self.lines):
            self.lines.add(line)
            count, most = len(self.lines), self.most
            if count > most:
                raise DamagedRecord(
                    f"{count} damaged records are more than max_bad_samples={most}; the last: {line}"
                )
            log.warning(
                "another record is read in place of a damaged one, %d of at most %d: %s", count, most, line
            )


class Taken(NamedTuple, Generic[_Content]):
    """What was read: the record's number, its content, and what was found damaged before it."""

    index: int  # type: ignore[assignment]  # hides tuple.index
    content: _Content
    damages: tuple[str, ...]


@dataclass(frozen=True)
class Spares:
    """Reads a record, or one like it where it is damaged.

    Which one depends on the seed, the sample's running number and the store alone.
    """

    seed: int = 0
    """Of the run."""

    is_tolerant: bool = False
    """Whether another record may be read instead; otherwise a damaged one is an error."""

    def read(
        self,
        sample_number: int,
        index: int,
        read: Callable[[int], _Content],
        candidates: Callable[[np.random.Generator], Iterator[int]],
    ) -> Taken[_Content]:
        """Read a record.

        Args:
            sample_number: running number of the sample in the run.
            index: of the record.
            read: reads a record by its number.
            candidates: records to take instead, best first, without `index`; random numbers break ties.

        Raises:
            DamagedRecord: if the record is damaged and none may be read instead, or none can.
        """
        try:
            return Taken(index, read(index), ())
        except DamagedRecord as error:
            if not self.is_tolerant:
                raise
            damages = [str(error)]
        random = np.random.Generator(np.random.PCG64([_KEY, self.seed, sample_number]))
        for spare in islice(candidates(random), _MOST_TRIES):
            try:
                return Taken(spare, read(spare), tuple(damages))
            except DamagedRecord as error:
                damages.append(str(error))
        raise DamagedRecord(f"{damages[0]} (and no sound record of its size could be read in its place)")


def batch_fields(items: Sequence[Any], taken: Sequence[Taken[Any]]) -> dict[str, Any]:
    """What a batch says of where its samples come from: `dataset`, `index`, `sample_number`, int64 (B,), and `damages`.

    Args:
        items: B items of a plan.
        taken: what was read for them.
    """
    rows = [(item.dataset, one.index, item.sample_number) for item, one in zip(items, taken, strict=True)]
    numbers = zip(("dataset", "index", "sample_number"), torch.tensor(rows).unbind(dim=1), strict=True)
    return {**dict(numbers), "damages": tuple(damage for one in taken for damage in one.damages)}


def of_nearest_size(sizes: np.ndarray, index: int, random: np.random.Generator) -> Iterator[int]:
    """Records by how near their size is, those of the same size first.

    Args:
        sizes: (N, 2), heights and widths in pixels.
        index: of the record to replace, which is left out.
        random: decides the order among equals.
    """
    distance = np.abs(sizes.astype(np.int64) - sizes[index]).sum(axis=1)
    shuffled = random.permutation(len(sizes))
    order = shuffled[np.argsort(distance[shuffled], kind="stable")]
    yield from (int(other) for other in order if other != index)


def of_same_size(sizes: np.ndarray, index: int, random: np.random.Generator) -> Iterator[int]:
    """Records of the same size, in random order; see `of_nearest_size`."""
    same = np.flatnonzero((sizes == sizes[index]).all(axis=1))
    yield from (int(other) for other in random.permutation(same) if other != index)
