"""Images and captions for training and evaluation, read from stores in the order of a plan."""

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from illume_lightning.data.latents import PlannedLatents, tokenizer_of
from illume_lightning.data.loader import (
    BatchLoader,
    ImageBatch,
    PlannedImages,
    TargetSize,
    batch_shape,
    deal_batches,
    evaluation_items,
)
from illume_lightning.data.plan import DatasetSource, Phase, Plan
from illume_lightning.data.remote import Remote
from illume_lightning.data.store import ImageStore, Store
from illume_lightning.lit.planned_data import PlannedDataModule, open_store, replica
from illume_lightning.resolution import PIXEL_STRIDE, check_size

__all__ = ["ImageBatch", "ImageDataModule", "Source"]

log = logging.getLogger(__name__)


@dataclass
class Source:
    """A store to train on."""

    path: str
    """Folder of the store, or its address, "s3://..." or "gs://..."."""

    weight: float = 1.0
    """Share of the training samples, relative to the other sources' weights, whatever the stores' sizes."""


class ImageDataModule(PlannedDataModule):
    """Training batches in the order of a plan, and validation batches at several sizes, such as "imagenet-any512".

    The phases of training (sizes, batch sizes) come from the `ResolutionCurriculum` callback.

    Args:
        train: stores to train on and their weights.
        val: stores to validate on, name: folder. Each is evaluated by itself, at every size.
        test: stores to test on, as `val`.
        predict: stores to predict on, as `val`.
        val_sizes: sides in pixels at which evaluation images are squares, each one a loader of its own.
        val_any_resolution: one more loader, with every image at its own size, rounded to multiples of 16
            and at most this side squared in area.
        val_ratios: one more loader, with every image at the nearest of the 11 ratios near this side squared.
        val_size_step: sides of these ratios are multiples of this many pixels (32 for the diffusion decoder).
        val_batch_size: most samples in an evaluation batch, per device.
        val_limit: most samples per evaluation loader, spread evenly over the store; none takes all.
        horizontal_flip: probability that a training image is mirrored.
        num_workers: processes that read, per device; 0 reads in the training process.
        prefetch: batches that each worker reads ahead.
        pin_memory: page-locked batches, where there is an accelerator.
        shuffle_window: samples of a store among which the order is fully random, see `Plan`.
        seed: of the order and the augmentation.
        remote: how stores in s3:// and gs:// are read.
        max_bad_samples: damaged training records, per device, that others are read in place of, named and counted;
            with 0 the first one ends the run. Evaluation always ends.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        train: list[Source] | None = None,
        val: dict[str, str] | None = None,
        test: dict[str, str] | None = None,
        predict: dict[str, str] | None = None,
        val_sizes: list[int] | None = None,
        val_any_resolution: int | None = None,
        val_ratios: int | None = None,
        val_size_step: int = PIXEL_STRIDE,
        val_batch_size: int = 16,
        val_limit: int | None = None,
        horizontal_flip: float = 0.5,
        num_workers: int = 2,
        prefetch: int = 4,
        pin_memory: bool = True,
        shuffle_window: int = 4096,
        seed: int = 0,
        remote: Remote = Remote(),
        max_bad_samples: int = 0,
    ) -> None:
        super().__init__(num_workers, prefetch, pin_memory, shuffle_window, seed, remote, max_bad_samples)
        if not 0 <= horizontal_flip <= 1:
            raise ValueError(f"horizontal_flip {horizontal_flip} is no probability; choose 0 to 1")
        for name, value in (("val_batch_size", val_batch_size), ("val_limit", val_limit)):
            if value is not None and value < 1:
                raise ValueError(f"{name} {value} is not positive")
        self.train_sources = list(train or [])
        self.paths = {"validate": dict(val or {}), "test": dict(test or {}), "predict": dict(predict or {})}
        if val_sizes is None and val_any_resolution is None and val_ratios is None:
            val_sizes = [256]
        for side in val_sizes or []:
            check_size(side, side)
        self._val_targets = [TargetSize("fixed", side) for side in val_sizes or []]
        if val_ratios is not None:
            self._val_targets.append(TargetSize("multi_ratio", val_ratios, val_size_step))
        if val_any_resolution is not None:
            self._val_targets.append(TargetSize("any_resolution", val_any_resolution))
        self.val_batch_size, self.val_limit = val_batch_size, val_limit
        self.horizontal_flip = horizontal_flip
        self._stores: dict[str, ImageStore] = {}

    def stores(self) -> list[Store]:
        """All stores that have been opened."""
        return list(self._stores.values())

    def _has_training_data(self) -> bool:
        return bool(self.train_sources)

    def _make_plan(self, phases: Sequence[Phase]) -> Plan:
        datasets = [
            DatasetSource(source.path, store.sizes, store.chunk_ids, source.weight)
            for source, store in zip(self.train_sources, self._train_stores(), strict=True)
        ]
        can_resize = self.tokenizer_fingerprint is None
        return Plan(phases, datasets, self.seed, self.shuffle_window, can_resize)

    def setup(self, stage: str) -> None:
        """Open the stores, so that what is missing is known at once.

        Raises:
            FileNotFoundError: if a store is missing; names it.
            ValueError: if a store is empty.
        """
        import litdata  # noqa: F401  # takes seconds; workers inherit it, and start anew for every evaluation

        if stage == "fit":
            self._training_reader()
        for path in self.paths["validate" if stage == "fit" else stage].values():
            self._store(path)

    def sample_images(self, num_batches: int) -> Iterator[Tensor]:
        """Training images from the present step on, one micro-batch of each step; training will see them too.

        Args:
            num_batches: how many; fewer at the end of the run.

        Yields:
            uint8 (B, 3, H, W); every device has its own.
        """
        start = 0 if self.trainer is None else self.trainer.global_step
        rank, world_size = replica(self.trainer)
        images = self._pictures()
        for step in range(start, min(start + num_batches, self.plan.schedule.num_steps)):
            yield images.read(self.plan.batch(step, 0, rank, world_size)).images

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """Of the tokenizer that made the training codes; ``None`` where the training data are pictures.

        Raises:
            ValueError: if the stores mix pictures and latents.
        """
        return tokenizer_of([store.manifest for store in self._train_stores()])

    def _training_reader(self) -> PlannedImages | PlannedLatents:
        if self.tokenizer_fingerprint is None:
            return self._pictures()
        if self.horizontal_flip > 0:
            raise ValueError(
                f"horizontal_flip is {self.horizontal_flip}, and latents can't be mirrored; set it to 0"
            )
        return PlannedLatents(self._train_stores(), self.seed, is_tolerant=self.max_bad_samples > 0)

    def _pictures(self) -> PlannedImages:
        return PlannedImages(
            self._train_stores(), self.seed, self.horizontal_flip, is_tolerant=self.max_bad_samples > 0
        )

    def _evaluation_loaders(self, stage: str) -> list[BatchLoader]:
        loaders = []
        self.val_names = []
        for name, path in self.paths[stage].items():
            store = self._store(path)
            for target in self._val_targets:
                items = evaluation_items(store.sizes, target, self.val_limit)
                batches = deal_batches(items, self.val_batch_size, *replica(self.trainer))
                max_bytes = max(math.prod(batch_shape(batch)) for batch in batches)
                loaders.append(BatchLoader(PlannedImages([store]), batches, max_bytes, **self._options()))
                self.val_names.append(f"{name}-{target.name}")
        return loaders

    def _train_stores(self) -> list[ImageStore]:
        return [self._store(source.path) for source in self.train_sources]

    def _store(self, path: str) -> ImageStore:
        if path not in self._stores:
            self._stores[path] = open_store(ImageStore, path, self.remote)
        return self._stores[path]

    def _fingerprint(self) -> str:
        stores = [
            (store.manifest.fingerprint, source.weight)
            for store, source in zip(self._train_stores(), self.train_sources, strict=True)
        ]
        return hashlib.sha256(json.dumps([stores, self.seed, self.shuffle_window]).encode()).hexdigest()
