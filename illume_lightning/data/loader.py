"""Batches of images as a plan names them: reading, and loaders that can stop and go on anywhere."""

import logging
import math
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from illume_lightning.data.ahead import fetch_ahead, look_ahead
from illume_lightning.data.image import DAMAGE
from illume_lightning.data.plan import PlanItem
from illume_lightning.data.remote import RemoteFile
from illume_lightning.data.schedule import Schedule, SizeMode
from illume_lightning.data.slots import InlineTensor, SharedSlots
from illume_lightning.data.spare import DamageLog, Spares, batch_fields, of_nearest_size
from illume_lightning.data.store import ImageStore, Record, Store
from illume_lightning.data.transform import decode_at, is_flipped
from illume_lightning.host_memory import keep_freed_memory
from illume_lightning.resolution import PIXEL_STRIDE, Size, any_resolution, nearest_ratio, ratio_sizes

log = logging.getLogger(__name__)


class TargetSize(NamedTuple):
    """Which size evaluation images are brought to; nothing is left out, however much is cropped.

    Args:
        mode: as a phase's: squares, the nearest of 11 ratios, or every image's own size.
        side: square root of the (largest) area, in pixels.
        step: sides of ratios are multiples of this many pixels.
    """

    mode: SizeMode
    side: int
    step: int = PIXEL_STRIDE

    def of(self, height: int, width: int) -> Size:
        """Target size of an image."""
        if self.mode == "fixed":
            return self.side, self.side
        if self.mode == "any_resolution":
            return any_resolution(height, width, self.side)
        return nearest_ratio(height, width, ratio_sizes(self.side, self.step)).size

    @property
    def name(self) -> str:
        """The end of a loader's name: 256, ratio256 or any256."""
        prefix = {"fixed": "", "multi_ratio": "ratio", "any_resolution": "any"}[self.mode]
        return f"{prefix}{self.side}"


class ImageBatch(NamedTuple):
    """B samples of one size.

    Args:
        images: RGB, uint8 (B, 3, H, W), 0 to 255.
        captions: B texts.
        metas: B texts, JSON of whatever else the records hold.
        dataset: int64 (B,), number of the source.
        index: int64 (B,), record in the source's store.
        sample_number: int64 (B,), running number in the run, or in the evaluation.
        damages: what was found damaged, a line each; `index` names what was read instead.
    """

    images: Tensor
    captions: list[str]
    metas: list[str]
    dataset: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    sample_number: Tensor
    damages: tuple[str, ...] = ()


class PlannedImages:
    """Reads the samples that a plan names; a whole batch at a time.

    Args:
        stores: the datasets, in the plan's order.
        seed: of the augmentation.
        horizontal_flip: probability that a sample is mirrored.
        is_tolerant: another picture may be read in place of a damaged one, see `Spares`.
    """

    writes_images = True

    def __init__(
        self,
        stores: Sequence[ImageStore],
        seed: int = 0,
        horizontal_flip: float = 0.0,
        is_tolerant: bool = False,
    ) -> None:
        self.stores = list(stores)
        self.seed = seed
        self.horizontal_flip = horizontal_flip
        self.spares = Spares(seed, is_tolerant)

    def records(self, items: Sequence[PlanItem]) -> Iterator[tuple[ImageStore, int]]:
        """Store and number of every record of a batch."""
        return ((self.stores[item.dataset], item.index) for item in items)

    def read(self, items: Sequence[PlanItem], images: Tensor | None = None) -> ImageBatch:
        """Read a batch of items that have one size.

        Args:
            items: at least one.
            images: uint8 (B, 3, H, W) to write the pictures to; none makes a new one.

        Raises:
            DamagedRecord: if a record is damaged, and none may be read in its place.
        """
        taken = []
        if images is None:
            images = torch.empty(batch_shape(items), dtype=torch.uint8)
        for image, item in zip(images.numpy(), items, strict=True):
            sizes = self.stores[item.dataset].sizes
            taken.append(
                self.spares.read(
                    item.sample_number,
                    item.index,
                    partial(self._read_one, item, image),
                    partial(of_nearest_size, sizes, item.index),
                )
            )
        captions = [one.content.caption for one in taken]
        metas = [one.content.meta for one in taken]
        return ImageBatch(images, captions, metas, **batch_fields(items, taken))

    def _read_one(self, item: PlanItem, image: np.ndarray, index: int) -> Record:
        """Read a record for a sample's place, and write its picture (3, H, W) there."""
        store = self.stores[item.dataset]
        record = store.read(index)
        flip = is_flipped(self.seed, item.sample_number, self.horizontal_flip)
        # A picture in another's place may have any size; stretched, its content would be distorted.
        stretch = item.stretch and (store.sizes[index] == store.sizes[item.index]).all()
        image[:] = decode_stored(record.image, item.size, store, index, stretch=bool(stretch), flip=flip)
        return record


def decode_stored(
    data: bytes, size: Size, store: Store, index: int, *, stretch: bool = False, flip: bool = False
) -> np.ndarray:
    """`decode_at` for an image of the record `index` of a store.

    Raises:
        DamagedRecord: if the image is damaged; names the store and the record.
    """
    try:
        return decode_at(data, size, stretch=stretch, flip=flip)
    except DAMAGE as error:
        raise store.damaged(index, f"an image cannot be decoded: {error}") from error


def batch_shape(items: Sequence[PlanItem]) -> tuple[int, int, int, int]:
    """(B, 3, H, W) of the pictures of items that have one size."""
    return len(items), 3, *items[0].size


class StepPlan(Protocol):
    """Names the samples of every micro-batch of every training step, as `Plan` and `PackPlan` do."""

    @property
    def schedule(self) -> Schedule:
        """The run's phases."""
        ...

    def batch(self, step: int, micro_batch: int, rank: int, world_size: int) -> Any:
        """What one device reads for one micro-batch; a reader knows how."""
        ...


class PlanBatches:
    """Plan items of one device's micro-batches, from the training step `first_step` to the end of the run."""

    def __init__(self, plan: StepPlan, rank: int, world_size: int) -> None:
        self.plan, self.rank, self.world_size = plan, rank, world_size
        self.first_step = 0

    def __iter__(self) -> Iterator[Any]:
        schedule = self.plan.schedule
        for step in range(self.first_step, schedule.num_steps):
            phase = schedule.phases[schedule.phase_index(step)]
            for micro_batch in range(phase.accumulation(self.world_size)):
                yield self.plan.batch(step, micro_batch, self.rank, self.world_size)

    def __len__(self) -> int:
        # Of the whole run, whatever `first_step`: Lightning counts batches from the start of the run.
        return self.plan.schedule.num_micro_batches(self.world_size)


class Reader(Protocol):
    """Reads batches."""

    writes_images: bool
    """Whether batches have pictures, which `read` writes where it is told to."""

    def read(self, items: Any, images: Tensor | None = None) -> Any:
        """A batch, a named tuple, of what the plan names.

        With ``images`` given, its pictures, the field of that name, are written there.
        """
        ...


class _SizedBatches(Sized, Iterable[Any], Protocol):
    pass


class BatchLoader:
    """A torch DataLoader over ready-made batches, whose workers write pictures to shared slots.

    It is no DataLoader itself, because Lightning would put a distributed sampler of its own over the plan.

    Args:
        reader: reads a batch.
        batches: what the reader takes for each batch; already this device's own.
        max_bytes: of the pictures of the largest batch.
        num_workers: processes that read; 0 reads in this one.
        prefetch: batches that each worker reads ahead.
        pin_memory: page-locked batches.
    """

    def __init__(
        self,
        reader: Reader,
        batches: _SizedBatches,
        max_bytes: int,
        num_workers: int = 0,
        prefetch: int = 4,
        pin_memory: bool = False,
    ) -> None:
        self.reader, self.batches, self.max_bytes = reader, batches, max_bytes
        self.num_workers, self.prefetch, self.pin_memory = num_workers, prefetch, pin_memory

    def __iter__(self) -> Iterator[Any]:
        slots = None
        if self.num_workers and self.reader.writes_images:
            # Beside those read ahead, training holds the present batch and Lightning the next.
            slots = SharedSlots(self.num_workers * self.prefetch + 3, self.max_bytes)
        batches: Any = _slotted(look_ahead(self.reader, self.batches), slots)  # torch's type knows lists only
        loader: DataLoader[Any] = DataLoader(
            _SlottedReader(self.reader, slots),
            batch_sampler=batches,
            collate_fn=_as_it_is,
            # Of its own: starting the workers must not draw from the run's random numbers.
            generator=torch.Generator(),
            num_workers=self.num_workers,
            prefetch_factor=self.prefetch if self.num_workers else None,
            pin_memory=self.pin_memory,
            worker_init_fn=_start_worker,
        )
        try:
            yield from loader
        except (OSError, ValueError) as error:
            raise _as_raised(error) from error

    def __len__(self) -> int:
        return len(self.batches)


class _SlottedReader(Dataset[Any]):
    """Reads batches into slots, in a worker."""

    def __init__(self, reader: Reader, slots: SharedSlots | None) -> None:
        self.reader, self.slots = reader, slots

    def __getitems__(self, batch: tuple[Any, tuple[RemoteFile, ...], int | None]) -> Any:
        items, soon, slot = batch
        fetch_ahead(soon)
        if self.slots is None or slot is None:
            return self.reader.read(items)
        shape = batch_shape(items)
        read = self.reader.read(items, self.slots.tensor(slot, shape))
        tensors = {name: value for name, value in read._asdict().items() if isinstance(value, Tensor)}
        small = {name: InlineTensor(tensor) for name, tensor in tensors.items() if name != "images"}
        return read._replace(images=self.slots.hand_over(slot, shape), **small)


def _slotted(
    batches: Iterable[tuple[Any, tuple[RemoteFile, ...]]], slots: SharedSlots | None
) -> Iterator[tuple[Any, tuple[RemoteFile, ...], int | None]]:
    for items, soon in batches:
        yield items, soon, slots.take(math.prod(batch_shape(items))) if slots else None


class PlanLoader(BatchLoader):
    """The training batches of one device. Its state is the number of finished training steps.

    Lightning saves and restores the state with every checkpoint; training then goes on with the first
    micro-batch of the first unfinished step, on any number of devices and with any number of workers.

    Args:
        reader: reads a batch.
        batches: this device's share of the plan.
        finished_steps: tells how many training steps are finished.
        fingerprint: of the data and seed.
        max_bad_samples: damaged records that are replaced until the run ends with an error.
        options: of BatchLoader.
    """

    batches: PlanBatches

    def __init__(
        self,
        reader: Reader,
        batches: PlanBatches,
        finished_steps: Callable[[], int],
        fingerprint: str,
        max_bad_samples: int = 0,
        **options: Any,
    ) -> None:
        max_pixels = max(phase.micro_batch_size * phase.max_area for phase in batches.plan.schedule.phases)
        super().__init__(reader, batches, 3 * max_pixels, **options)
        self._finished_steps = finished_steps
        self._fingerprint = fingerprint
        self._damage_log = DamageLog(max_bad_samples)

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            self._damage_log.add(getattr(batch, "damages", ()))
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Finished training steps, and the fingerprint of what they read."""
        return {"step": self._finished_steps(), "data": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begin where `state` was saved."""
        self.batches.first_step = state["step"]
        if state.get("data", self._fingerprint) != self._fingerprint:
            log.warning(
                "the training data, their weights, the shuffle window or the seed differ from the "
                "checkpoint's: from step %d on the run reads the new order, not the rest of the old one",
                state["step"],
            )


def evaluation_items(sizes: np.ndarray, target_size: TargetSize, limit: int | None = None) -> list[PlanItem]:
    """Every image of a store once, or `limit` of them spread evenly, sorted by target size.

    Args:
        sizes: (N, 2), heights and widths in pixels.
        target_size: of an image.
        limit: most items.
    """
    count = len(sizes) if limit is None else min(limit, len(sizes))

    def target(index: int) -> Size:
        height, width = sizes[index].tolist()
        return target_size.of(height, width)

    placed = sorted((target(index), index) for index in (i * len(sizes) // count for i in range(count)))
    stretch = target_size.mode == "any_resolution"
    return [PlanItem(0, index, size, number, stretch) for number, (size, index) in enumerate(placed)]


def deal_batches(
    items: Sequence[PlanItem], batch_size: int, rank: int, world_size: int
) -> list[list[PlanItem]]:
    """One device's batches out of items that are sorted by size.

    Every item goes to exactly one device, batches have one size, and all devices get equally many: with
    several devices, models wait for each other in every batch. Batches are halved until they come out even.

    Args:
        items: sorted by size.
        batch_size: most items in a batch.
        rank: number of the device.
        world_size: number of devices.

    Raises:
        ValueError: if single items don't come out even either.
    """
    batches: list[list[PlanItem]] = []
    for item in items:
        if not batches or batches[-1][0].size != item.size or len(batches[-1]) == batch_size:
            batches.append([])
        batches[-1].append(item)
    while len(batches) % world_size:
        largest = max(range(len(batches)), key=lambda number: len(batches[number]))
        batch = batches[largest]
        if len(batch) == 1:
            raise ValueError(
                f"{len(items)} evaluation images cannot be dealt evenly to {world_size} devices; set "
                f"val_limit to a multiple of {world_size}, or evaluate on one device"
            )
        batches[largest : largest + 1] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
    return batches[rank::world_size]


def _start_worker(number: int) -> None:
    # A scheduler may ask the whole process group to end: the run saves first, and then ends its workers.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    keep_freed_memory()  # decoding needs the same blocks over and over


def _as_raised(error: OSError | ValueError) -> Exception:
    """The error that a worker raised; torch makes one with the worker's whole traceback as its message."""
    head, separator, _ = str(error).partition("\nOriginal Traceback")
    if not separator or not head.startswith("Caught "):
        return error
    *_, last = str(error).strip().splitlines()
    return type(error)(last.partition(": ")[2])


def _as_it_is(batch: Any) -> Any:
    return batch
