"""Which conversations every training step reads, and how they are packed into rows of tokens.

Like the plan beneath, a pure function of the step: what a step reads does not depend on devices or micro-batches.
Rows hold whole conversations; nothing is cut.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from illume_lightning.data.bucket import Shapes, target_size
from illume_lightning.data.latest import Latest
from illume_lightning.data.plan import DatasetSource, Plan
from illume_lightning.data.schedule import Phase, Schedule
from illume_lightning.image_layout import image_layout
from illume_lightning.resolution import Size, any_resolution, ratio_sizes
from illume_lightning.vocabulary import Vocabulary

NUM_SIZE_TOKENS = 2
_STEPS_DESCRIBED = 20


class PackItem(NamedTuple):
    """One conversation to read.

    Args:
        dataset: number of the dataset.
        index: record in the dataset.
        sample_number: running number of the sample in the run, unique; keys its augmentation.
        phase: number of the phase, which decides the sizes of its images.
        length: tokens.
    """

    dataset: int
    index: int  # type: ignore[assignment]  # hides tuple.index
    sample_number: int
    phase: int
    length: int


class MicroBatchItems(NamedTuple):
    """What one device reads for one forward pass.

    Args:
        rows: conversations of every row.
        num_supervised: tokens to predict in the whole training step, over all devices and micro-batches.
    """

    rows: list[list[PackItem]]
    num_supervised: int


@dataclass(frozen=True)
class ConversationSource:
    """What packing knows of a dataset with N conversations and M images.

    Args:
        name: for messages.
        num_text: (N,) integers, tokens without images and sizes.
        num_supervised: (N,) integers, those of them that are predicted.
        first_image: (N + 1,) integers, where each conversation's images begin.
        images: (M, 4) integers, rows of whether it is generated, height, width, and how often its size is named.
        chunk_ids: (N,) integers, chunk that each conversation is stored in.
        weight: share of the training samples, relative to the other datasets' weights.
    """

    name: str
    num_text: np.ndarray
    num_supervised: np.ndarray
    first_image: np.ndarray
    images: np.ndarray
    chunk_ids: np.ndarray
    weight: float = 1.0


class PackPlan:
    """Conversations of every training step, packed.

    Args:
        phases: of the run; `batch_size` counts conversations.
        sources: what is mixed.
        vocabulary: decides how long images are.
        row_tokens: most tokens of a row; longer conversations are left out and counted.
        seed: of the order; not negative.
        shuffle_window: see `Plan`.

    Raises:
        ValueError: if a row is too short for any image, a phase leaves nothing of a dataset, or an argument is
            out of range.
    """

    def __init__(
        self,
        phases: Sequence[Phase],
        sources: Sequence[ConversationSource],
        vocabulary: Vocabulary,
        row_tokens: int,
        seed: int = 0,
        shuffle_window: int = 4096,
    ) -> None:
        self.schedule = Schedule(phases)
        self.sources, self.row_tokens = tuple(sources), row_tokens
        self._measures = [
            [_measure(phase, source, vocabulary) for source in self.sources] for phase in self.schedule.phases
        ]
        self._kept = [[np.flatnonzero(m.lengths <= row_tokens) for m in row] for row in self._measures]
        self._check()
        # A plan of its own for every phase: what is too long differs between phases.
        self._plans = [
            self._plan_of(index, seed, shuffle_window) for index in range(len(self.schedule.phases))
        ]
        self._rows = Latest(self._make_rows)

    def batch(self, step: int, micro_batch: int, rank: int, world_size: int) -> MicroBatchItems:
        """Rows of one micro-batch on one device.

        Args:
            step: training step.
            micro_batch: number within the training step.
            rank: number of the device among those that read different data.
            world_size: number of these devices.

        Raises:
            ValueError: if there is no such step.
        """
        phase = self.schedule.phases[self.schedule.phase_index(step)]
        num_groups = phase.accumulation(world_size) * world_size
        rows, num_supervised = self._rows(step, num_groups)
        per_group = len(rows) // num_groups
        # Rows are sorted by length, so those that run at the same time on all devices are alike.
        mine = rows[(micro_batch * world_size + rank) * per_group :][:per_group]
        return MicroBatchItems(mine, num_supervised)

    def _make_rows(self, step: int, num_groups: int) -> tuple[list[list[PackItem]], int]:
        """All rows of a training step, and how many of their tokens are predicted."""
        items = self.samples(step)
        packed = pack([item.length for item in items], self.row_tokens, num_groups)
        measures = self._measures[self.schedule.phase_index(step)]
        total = sum(int(measures[item.dataset].supervised[item.index]) for item in items)
        return [[items[number] for number in row] for row in packed], total

    def samples(self, step: int) -> list[PackItem]:
        """All conversations of a training step, on all devices.

        Raises:
            ValueError: if there is no such step.
        """
        index = self.schedule.phase_index(step)
        within = step - self.schedule.first_step(index)
        number = self.schedule.first_sample(step)
        items = []
        for offset, item in enumerate(self._plans[index].batch(within, 0, 0, 1)):
            record = int(self._kept[index][item.dataset][item.index])
            length = int(self._measures[index][item.dataset].lengths[record])
            items.append(PackItem(item.dataset, record, number + offset, index, length))
        return items

    def describe(self) -> str:
        """What every phase reads, what is left out, and how full rows are; one text for the log."""
        lines = []
        for index, phase in enumerate(self.schedule.phases):
            first, steps = self.schedule.first_step(index), self.schedule.steps_in(index)
            tokens, places, rows = self.fill(index)
            lines.append(
                f"phase {index}: steps {first:,} to {phase.until_step:,}, {phase.mode} {phase.side} px, "
                f"{steps:,} x {phase.batch_size} conversations; about {rows:.1f} rows of up to {self.row_tokens:,} "
                f"tokens a step, {1 - tokens / places:.1%} padding"
            )
            for source, kept in zip(self.sources, self._kept[index], strict=True):
                lost = len(source.num_text) - len(kept)
                lines.append(
                    f"  {source.name}: {len(kept):,} conversations, {lost:,} left out "
                    "(too long for a row, or an image cropped by more than 20 %)"
                )
        return "\n".join(lines)

    def fill(self, phase_index: int) -> tuple[int, int, float]:
        """Tokens and places of a phase's first steps, on one device, and rows a step."""
        first = self.schedule.first_step(phase_index)
        steps = range(first, first + min(_STEPS_DESCRIBED, self.schedule.steps_in(phase_index)))
        accumulation = self.schedule.phases[phase_index].accumulation(1)
        tokens = places = rows = 0
        for step in steps:
            for number in range(accumulation):
                lengths = [sum(item.length for item in row) for row in self.batch(step, number, 0, 1).rows]
                tokens, places, rows = (
                    tokens + sum(lengths),
                    places + len(lengths) * max(lengths),
                    rows + len(lengths),
                )
        return tokens, places, rows / len(steps)

    def _plan_of(self, index: int, seed: int, shuffle_window: int) -> Plan:
        phase = self.schedule.phases[index]
        datasets = [
            DatasetSource(
                source.name, np.full((len(kept), 2), phase.side), source.chunk_ids[kept], source.weight
            )
            for source, kept in zip(self.sources, self._kept[index], strict=True)
        ]
        steps = self.schedule.steps_in(index)
        whole = Phase(steps, "fixed", phase.side, phase.batch_size, phase.batch_size)
        return Plan([whole], datasets, seed + (index << 32), shuffle_window)

    def _check(self) -> None:
        if not self.sources:
            raise ValueError("there are no conversations to train on; give at least one dataset")
        for index, phase in enumerate(self.schedule.phases):
            for source, measure, kept in zip(
                self.sources, self._measures[index], self._kept[index], strict=True
            ):
                if not len(source.num_text):
                    raise ValueError(f"dataset {source.name} is empty")
                if not len(kept):
                    shortest = int(measure.lengths.min())
                    what = (
                        "crops each of its conversations' images by more than 20 %"
                        if shortest >= _TOO_LONG
                        else f"needs at least {shortest:,} tokens for its shortest conversation"
                    )
                    raise ValueError(
                        f"phase {index} ({phase.mode}, {phase.side} px) leaves nothing of {source.name}: it {what}, "
                        f"and a row has {self.row_tokens:,}; raise row_tokens, lower side, or leave the dataset out"
                    )


class SizedImage(NamedTuple):
    """The size that an image of a conversation is brought to, and whether it is stretched to it."""

    size: Size
    stretch: bool


def image_size(phase: Phase, is_generation: bool, height: int, width: int) -> SizedImage | None:
    """Size of a conversation's image in a phase; none where it would be cropped too much.

    Args:
        phase: its mode and sides.
        is_generation: whether an image of the conversation is to be generated; then all its images take sizes
            that have tokens, and at any resolution the nearest ratio (official release).
        height: of the image, in pixels.
        width: of the image, in pixels.
    """
    if phase.mode == "any_resolution" and not is_generation:
        return SizedImage(any_resolution(height, width, phase.side), True)
    phase = phase.generating
    size = target_size(phase, ratio_sizes(phase.side, phase.size_step), height, width)
    return None if size is None else SizedImage(size, False)


def pack(lengths: Sequence[int], capacity: int, multiple: int = 1) -> list[list[int]]:
    """Put samples into rows that are all about equally long, so that little padding is needed.

    The longest sample goes first, always into the emptiest row. Of the numbers of rows from the fewest that hold
    all samples to a third more, the one with the smallest padded area is taken.

    Args:
        lengths: of n samples, each at most `capacity`.
        capacity: most tokens of a row.
        multiple: the number of rows is a multiple of this; at most n.

    Returns:
        Numbers of samples by row, longest row first; no row is empty.

    Raises:
        ValueError: if n is no multiple of `multiple` and single samples don't come out even either.
    """
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    num_rows = -(-max(1, math.ceil(sum(lengths) / capacity)) // multiple) * multiple
    best: list[list[int]] = []
    best_area, most = 0, len(lengths)
    while num_rows <= most:
        rows = _emptiest_first(order, lengths, capacity, num_rows)
        if rows is not None:
            area = num_rows * sum(lengths[number] for number in rows[0])
            if not best:
                most = min(most, num_rows + max(multiple, num_rows // 3))
            if not best or area < best_area:
                best, best_area = rows, area
        num_rows += multiple
    if not best:
        raise ValueError(
            f"{len(lengths)} conversations can't fill a multiple of {multiple} rows of {capacity:,} tokens: give a "
            f"number of them (val_limit) that is a multiple of {multiple}, or raise row_tokens"
        )
    return best


def _emptiest_first(
    order: Sequence[int], lengths: Sequence[int], capacity: int, num_rows: int
) -> list[list[int]] | None:
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    heap = [(0, number) for number in range(num_rows)]
    for sample in order:
        filled, number = heap[0]
        if filled + lengths[sample] > capacity:
            return None
        rows[number].append(sample)
        heapq.heapreplace(heap, (filled + lengths[sample], number))
    filled_of = {number: filled for filled, number in heap}
    return [rows[number] for number in sorted(range(num_rows), key=lambda number: -filled_of[number])]


def evaluation_batches(
    phase: Phase,
    source: ConversationSource,
    vocabulary: Vocabulary,
    row_tokens: int,
    rows: int,
    limit: int | None,
    rank: int,
    world_size: int,
) -> list[MicroBatchItems]:
    """Every conversation of a dataset once, or `limit` of them spread evenly, packed; one device's share.

    Args:
        phase: decides the images' sizes.
        source: the dataset.
        vocabulary: decides how long images are.
        row_tokens: most tokens of a row; longer conversations are left out.
        rows: most rows of a batch.
        limit: most conversations.
        rank: number of the device.
        world_size: number of devices; all get equally many batches, and so many conversations are taken that
            every batch has one.

    Raises:
        ValueError: if too few conversations fit a row.
    """
    measure = _measure(phase, source, vocabulary)
    kept = np.flatnonzero(measure.lengths <= row_tokens)
    if limit is not None:
        kept = kept[np.arange(min(limit, len(kept))) * len(kept) // min(limit, len(kept))]
    if len(kept) < world_size:
        raise ValueError(
            f"{len(kept)} of {len(measure.lengths)} conversations of {source.name} fit a row of {row_tokens:,} tokens, "
            f"and there are {world_size} devices; raise row_tokens or give more held-out conversations"
        )
    items = [
        PackItem(0, record, number, 0, int(measure.lengths[record]))
        for number, record in enumerate(kept.tolist())
    ]
    packed = pack([item.length for item in items], row_tokens, world_size)
    mine = packed[rank::world_size]
    num_supervised = int(measure.supervised[kept].sum())
    return [
        MicroBatchItems([[items[n] for n in row] for row in mine[start : start + rows]], num_supervised)
        for start in range(0, len(mine), rows)
    ]


_TOO_LONG = 1 << 40  # tokens of an image that makes its conversation too long for any row


class _Measure(NamedTuple):
    """Tokens (N,) of each conversation in a phase, and those of them that are predicted."""

    lengths: np.ndarray
    supervised: np.ndarray


def _measure(phase: Phase, source: ConversationSource, vocabulary: Vocabulary) -> _Measure:
    lengths, supervised = source.num_text.astype(np.int64), source.num_supervised.astype(np.int64)
    if not len(source.images):
        return _Measure(lengths, supervised)
    owner = np.repeat(np.arange(len(lengths)), np.diff(source.first_image))
    is_target = source.images[:, 0].astype(bool)
    has_target = np.zeros(len(lengths), dtype=bool)
    np.logical_or.at(has_target, owner, is_target)
    image_tokens = np.empty(len(owner), dtype=np.int64)
    for is_generation in (False, True):
        chosen = has_target[owner] == is_generation
        shapes = Shapes.of(source.images[chosen, 1:3])
        sizes = [image_size(phase, is_generation, height, width) for height, width in shapes.sizes.tolist()]
        of_shape = [
            _TOO_LONG if sized is None else image_layout(sized.size, vocabulary).length for sized in sizes
        ]
        image_tokens[chosen] = np.array(of_shape, dtype=np.int64)[shapes.of_sample]
    mentioned = NUM_SIZE_TOKENS * source.images[:, 3].astype(np.int64)
    np.add.at(lengths, owner, image_tokens + mentioned)
    np.add.at(supervised, owner[is_target], image_tokens[is_target] + NUM_SIZE_TOKENS)
    return _Measure(lengths, supervised)
