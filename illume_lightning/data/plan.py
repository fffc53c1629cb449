"""The plan: which samples a run reads, as a pure function of the training step.

Nothing here depends on what was read before, on the number of devices or on the size of a micro-batch, so a
run can start, stop and continue anywhere, on any number of devices, and reads the same samples in the same
order. The caches only save time.

Order, in one phase: an interleave of the buckets says which size a training step has; within a bucket an
interleave of the datasets says where each sample comes from; and within a lane, the samples of one dataset
in one bucket, every pass takes each sample exactly once. A pass visits the chunks of a dataset in a random
order that all its lanes share and shuffles within windows, so that a store far away is read chunk by chunk.
Every phase begins new passes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from illume_lightning.data.bucket import Shapes, assign_buckets
from illume_lightning.data.latest import Latest
from illume_lightning.data.schedule import Phase, Schedule
from illume_lightning.resolution import MAX_CROP, Size, any_resolution

__all__ = ["DatasetSource", "Phase", "Plan", "PlanItem", "Schedule", "interleave"]

_CHUNK_ORDER, _WINDOW_ORDER, _BUCKETS, _DATASETS = 1, 2, 3, 4  # first words of the random keys
_STEPS_AT_ONCE = 1024


class PlanItem(NamedTuple):
    """One sample to read.

    Args:
        dataset: number of the dataset.
        index: record in the dataset.
        size: height and width in pixels that the batch has.
        sample_number: running number of the sample in the run, unique; keys its augmentation.
        stretch: scale to `size` as it is, rather than cover it and crop: a picture of any resolution whose
            own size only rounds to `size` (official release).
    """

    dataset: int
    index: int  # type: ignore[assignment]  # hides tuple.index
    size: Size
    sample_number: int
    stretch: bool = False


@dataclass(frozen=True)
class DatasetSource:
    """What the plan knows of a dataset with N samples.

    Args:
        name: for messages.
        sizes: (N, 2) integers, height and width of each picture in pixels.
        chunk_ids: (N,) integers from 0, chunk that each sample is stored in.
        weight: share of the training samples, relative to the other datasets' weights.
    """

    name: str
    sizes: np.ndarray
    chunk_ids: np.ndarray
    weight: float = 1.0


class Plan:
    """Samples of every training step of a run.

    Args:
        phases: the phases of the run.
        datasets: what is mixed.
        seed: of every random order; not negative.
        shuffle_window: samples of a dataset among which the order is fully random; datasets that are
            smaller are fully shuffled.
        merge_buckets: pictures of rare sizes join their neighbours; off for samples whose size is fixed.

    Raises:
        ValueError: if a dataset is empty, or a phase leaves nothing of it, or an argument is out of range.
    """

    def __init__(
        self,
        phases: Sequence[Phase],
        datasets: Sequence[DatasetSource],
        seed: int = 0,
        shuffle_window: int = 4096,
        merge_buckets: bool = True,
    ) -> None:
        self.schedule = Schedule(phases)
        self.datasets = tuple(datasets)
        self.seed = seed
        self.shuffle_window = shuffle_window
        self._check()
        shapes = [Shapes.of(np.asarray(dataset.sizes)) for dataset in self.datasets]
        self._shapes = shapes
        self._buckets = [assign_buckets(phase, shapes, merge_buckets) for phase in self.schedule.phases]
        self._check_buckets()
        weights = np.array([[dataset.weight] for dataset in self.datasets])
        shares = [buckets.counts / buckets.counts.sum(axis=1, keepdims=True) for buckets in self._buckets]
        self._rates_of = [weights / weights.sum() * share for share in shares]
        self._lanes = Latest(self._make_lanes)
        self._bucket_order = Latest(self._make_bucket_order)
        self._step = Latest(self._make_step)

    def batch(self, step: int, micro_batch: int, rank: int, world_size: int) -> list[PlanItem]:
        """Samples of one micro-batch on one device; all of them have one size, on all devices.

        Args:
            step: training step.
            micro_batch: number within the training step.
            rank: number of the device among those that read different data.
            world_size: number of these devices.

        Raises:
            ValueError: if there is no such step, micro-batch or rank.
        """
        phase = self.schedule.phases[self.schedule.phase_index(step)]
        count = phase.accumulation(world_size)
        if not (0 <= micro_batch < count and 0 <= rank < world_size):
            raise ValueError(
                f"micro-batch {micro_batch} of {count} on device {rank} of {world_size} at training step "
                f"{step}: both count from 0"
            )
        size, datasets, indices = self._step(step)
        start = (micro_batch * world_size + rank) * phase.micro_batch_size
        mine = slice(start, start + phase.micro_batch_size)
        places = zip(datasets[mine].tolist(), indices[mine].tolist(), strict=True)
        first_sample = self.schedule.first_sample(step) + start
        return [
            PlanItem(dataset, index, size, number, self._stretches(phase, dataset, index, size))
            for number, (dataset, index) in enumerate(places, first_sample)
        ]

    def _stretches(self, phase: Phase, dataset: int, index: int, size: Size) -> bool:
        if phase.mode != "any_resolution":
            return False
        height, width = self.datasets[dataset].sizes[index].tolist()
        return size == any_resolution(height, width, phase.side)

    def describe(self) -> str:
        """What every phase reads: buckets, samples, what is left out, and passes; one text for the log."""
        lines = []
        for index, (phase, buckets) in enumerate(zip(self.schedule.phases, self._buckets, strict=True)):
            first, steps = self.schedule.first_step(index), self.schedule.steps_in(index)
            lines.append(
                f"phase {index}: steps {first:,} to {phase.until_step:,}, {phase.mode} {phase.side} px, "
                f"{steps:,} x {phase.batch_size} samples, {len(buckets.sizes)} sizes"
            )
            share = self._rates(index).sum(axis=1)
            for number, dataset in enumerate(self.datasets):
                samples = int(buckets.counts[number].sum())
                passes = share[number] * steps * phase.batch_size / samples
                lines.append(
                    f"  {dataset.name}: {samples:,} samples, {passes:.2f} passes; "
                    f"{buckets.num_merged[number]:,} in a neighbour's size, "
                    f"{buckets.num_excluded[number]:,} left out (cropped by more than {MAX_CROP:.0%})"
                )
        return "\n".join(lines)

    def num_excluded(self, phase_index: int) -> int:
        """Pictures that a phase leaves out because they would be cropped by more than 20 %."""
        return int(self._buckets[phase_index].num_excluded.sum())

    def lane_sizes(self, phase_index: int) -> dict[tuple[int, Size], int]:
        """Samples of each lane of a phase, by dataset and size."""
        buckets = self._buckets[phase_index]
        return {
            (dataset, buckets.sizes[bucket]): int(buckets.counts[dataset, bucket])
            for dataset, bucket in np.argwhere(buckets.counts).tolist()
        }

    def _rates(self, phase_index: int) -> np.ndarray:
        """Share (D, b) of the samples of a phase that each lane gives: datasets by weight, lanes by count."""
        return self._rates_of[phase_index]

    def _make_step(self, step: int) -> tuple[Size, np.ndarray, np.ndarray]:
        """Size, datasets (B,) and records (B,) of a whole training step."""
        phase_index = self.schedule.phase_index(step)
        batch_size = self.schedule.phases[phase_index].batch_size
        block, within = divmod(step - self.schedule.first_step(phase_index), _STEPS_AT_ONCE)
        order, occurrences = self._bucket_order(phase_index, block)
        bucket, occurrence = int(order[within]), int(occurrences[within])
        rates = self._rates(phase_index)[:, bucket]
        lanes = np.flatnonzero(rates)
        start = occurrence * batch_size
        slots, places = interleave(
            rates[lanes], start, start + batch_size, (_DATASETS, self.seed, phase_index, bucket)
        )
        indices = np.empty(batch_size, dtype=np.int64)
        for lane, dataset in enumerate(lanes.tolist()):
            indices[slots == lane] = self._lanes(phase_index)[dataset, bucket].at(places[slots == lane])
        return self._buckets[phase_index].sizes[bucket], lanes[slots], indices

    def _make_bucket_order(self, phase_index: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        start = block * _STEPS_AT_ONCE
        rates = self._rates(phase_index).sum(axis=0)
        return interleave(rates, start, start + _STEPS_AT_ONCE, (_BUCKETS, self.seed, phase_index))

    def _make_lanes(self, phase_index: int) -> dict[tuple[int, int], "_Lane"]:
        lanes = {}
        buckets = self._buckets[phase_index]
        for number, (dataset, shapes) in enumerate(zip(self.datasets, self._shapes, strict=True)):
            bucket_of = buckets.of_shape[number][shapes.of_sample]
            order = np.lexsort((dataset.chunk_ids, bucket_of))
            bounds = np.searchsorted(bucket_of[order], np.arange(len(buckets.sizes) + 1))
            for bucket in np.flatnonzero(buckets.counts[number]).tolist():
                samples = order[bounds[bucket] : bounds[bucket + 1]]
                lanes[number, bucket] = _Lane(
                    samples,
                    dataset.chunk_ids,
                    window=-(-self.shuffle_window * len(samples) // len(order)),
                    chunk_key=(_CHUNK_ORDER, self.seed, phase_index, number),
                    window_key=(_WINDOW_ORDER, self.seed, phase_index, number, bucket),
                )
        return lanes

    def _check(self) -> None:
        if not self.datasets:
            raise ValueError("the plan has no datasets; give at least one")
        if self.seed < 0:
            raise ValueError(f"seed {self.seed} is negative")
        if self.shuffle_window < 1:
            raise ValueError(f"shuffle_window {self.shuffle_window} is not positive; 1 shuffles chunks only")
        for dataset in self.datasets:
            if not len(dataset.sizes):
                raise ValueError(f"dataset {dataset.name} is empty")
            if np.shape(dataset.sizes) != (len(dataset.chunk_ids), 2):
                raise ValueError(
                    f"dataset {dataset.name}: sizes have shape {np.shape(dataset.sizes)}, "
                    f"expected ({len(dataset.chunk_ids)}, 2) as there are that many chunk_ids"
                )
            if not 0 < dataset.weight < float("inf"):
                raise ValueError(f"dataset {dataset.name}: weight {dataset.weight} is not positive")

    def _check_buckets(self) -> None:
        for index, (phase, buckets) in enumerate(zip(self.schedule.phases, self._buckets, strict=True)):
            for dataset, row in zip(self.datasets, buckets.counts, strict=True):
                if not row.sum():
                    raise ValueError(
                        f"phase {index} ({phase.mode}, {phase.side} px) would crop each of the "
                        f"{len(dataset.sizes)} pictures of {dataset.name} by more than {MAX_CROP:.0%}; "
                        "leave the dataset out"
                    )


class _Lane:
    """The samples of one dataset in one bucket: a sequence of passes, each a permutation of all of them.

    Args:
        samples: (n,), records of the dataset, sorted by chunk.
        chunk_ids: (N,), chunk of each record of the dataset.
        window: the order is fully random among this many samples.
        chunk_key: of the order of the chunks; the same for all lanes of a dataset.
        window_key: of the order within windows.
    """

    def __init__(
        self,
        samples: np.ndarray,
        chunk_ids: np.ndarray,
        window: int,
        chunk_key: tuple[int, ...],
        window_key: tuple[int, ...],
    ) -> None:
        self.samples, self.window = samples, window
        self._num_chunks = int(chunk_ids.max()) + 1
        self._chunks, self._starts, self._counts = np.unique(
            chunk_ids[samples], return_index=True, return_counts=True
        )
        self._chunk_key, self._window_key = chunk_key, window_key
        self._chunk_order = Latest(self._make_chunk_order)
        self._latest_window = Latest(self._make_window)

    def at(self, occurrences: np.ndarray) -> np.ndarray:
        """Records (k,) at rising occurrences (k,) of the lane, counted from 0 through all passes."""
        passes, places = np.divmod(occurrences, len(self.samples))
        windows, offsets = np.divmod(places, self.window)
        records = np.empty(len(occurrences), dtype=np.int64)
        windows_in_all = passes * -(-len(self.samples) // self.window) + windows
        if (
            len(occurrences) and windows_in_all[0] == windows_in_all[-1]
        ):  # occurrences rise, so this is all of them
            return self._latest_window(int(passes[0]), int(windows[0]))[offsets]
        for number in np.unique(windows_in_all):
            members = windows_in_all == number
            window = self._latest_window(int(passes[members][0]), int(windows[members][0]))
            records[members] = window[offsets[members]]
        return records

    def _make_window(self, number: int, window: int) -> np.ndarray:
        start = window * self.window
        stop = min(start + self.window, len(self.samples))
        places = start + _generator(*self._window_key, number, window).permutation(stop - start)
        order, ends = self._chunk_order(number)
        rows = np.searchsorted(ends, places, side="right")
        chunks = order[rows]
        return self.samples[self._starts[chunks] + places - ends[rows] + self._counts[chunks]]

    def _make_chunk_order(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Order of the lane's chunks in a pass, and the place at which each of them ends."""
        ranks = _generator(*self._chunk_key, number).permutation(self._num_chunks)
        order = np.argsort(ranks[self._chunks])
        return order, np.cumsum(self._counts[order])


def interleave(
    rates: np.ndarray, start: int, stop: int, key: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Positions `start` to `stop` of an endless, even and irregular interleave of C lanes.

    Lane c has its event i at the time (i + u) / rate, with u uniform in [0, 1): one event in each stretch of
    1 / rate, at a random place in it. All events in the order of their times make the interleave. Of the
    first n positions a lane has its share to within 1 + (C - 2) x share: with two lanes, to within 1.

    Args:
        rates: (C,), positive, of any sum.
        start: first position, from 0.
        stop: position after the last.
        key: of the random numbers; not negative.

    Returns:
        (stop - start,) lanes, and (stop - start,) how many events of that lane came before.
    """
    num_lanes = len(rates)
    if num_lanes == 1:
        return np.zeros(stop - start, dtype=np.int64), np.arange(start, stop)
    rates = np.asarray(rates, dtype=np.float64) / np.sum(rates)
    # The event at position p lies between the times p - C and p + C; this span holds all that are asked for.
    firsts = np.maximum(0, np.floor((start - num_lanes - 1) * rates).astype(np.int64) - 1)
    stops = np.ceil((stop + num_lanes + 1) * rates).astype(np.int64) + 1
    lanes = np.repeat(np.arange(num_lanes), stops - firsts)
    events = np.concatenate([np.arange(first, end) for first, end in zip(firsts, stops, strict=True)])
    jitter = np.concatenate(
        [
            np.random.Generator(_bits(*key, lane).advance(first)).random(end - first)
            for lane, (first, end) in enumerate(zip(firsts.tolist(), stops.tolist(), strict=True))
        ]
    )
    order = np.argsort((events + jitter) / rates[lanes], kind="stable")
    chosen = order[start - firsts.sum() : stop - firsts.sum()]
    return lanes[chosen], events[chosen]


def _bits(*key: int) -> np.random.PCG64:
    return np.random.PCG64(np.random.SeedSequence(key))


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(_bits(*key))
