"""Training steps of the real LightningModules under the Trainer, on batches that are made up."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from illume_lightning.budget.dry_step import CPU_FORMULAS
from illume_lightning.data.loader import ImageBatch
from illume_lightning.data.schedule import Phase
from illume_lightning.lit.training import TrainingModule
from illume_lightning.resolution import Size

GIB = 2**30


def picture_batch(count: int, size: Size, seed: int = 0) -> ImageBatch:
    """Noise with captions, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randint(256, (count, 3, *size), dtype=torch.uint8, generator=generator)
    numbers = torch.arange(count)
    return ImageBatch(pictures, ["noise"] * count, [""] * count, numbers, numbers, numbers)


class MadeUpData(L.LightningDataModule):
    """The same micro-batches again and again, without reading; and what modules and callbacks ask for besides.

    Args:
        batches: to take in turns.
        count: micro-batches in all.
    """

    seed = 0

    def __init__(self, batches: Sequence[Any], count: int) -> None:
        super().__init__()
        self.train_names: list[str] = []
        self.val_names: list[str] = []
        self._batches = [batches[number % len(batches)] for number in range(count)]

    def set_curriculum(self, phases: Sequence[Phase]) -> None:
        """The batches stay what they are."""

    def train_dataloader(self) -> DataLoader:
        """In order."""
        return DataLoader(self._batches, batch_size=None, collate_fn=lambda batch: batch)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Timing:
    """What was measured of a module's training."""

    seconds: float
    """Of a micro-batch, with its share of the optimizers' steps."""

    flops: int | None
    """Operations of a micro-batch's matrix products, convolutions and attention, where they were counted; a mean."""

    peak_gib: float | None
    """Most memory of an accelerator that tensors took."""


class Clock(L.Callback):
    """Times micro-batches as a stretch, so that a device can run behind the host.

    Args:
        warmup: micro-batches before the first one that counts.
        counted: micro-batches at the start whose operations are counted; they have to run without compiled parts.
    """

    def __init__(self, warmup: int, counted: int = 0) -> None:
        assert counted <= warmup  # counting takes time
        self._warmup, self._counted, self._number, self._began = warmup, counted, 0, 0.0
        self._counter = FlopCounterMode(display=False, custom_mapping=CPU_FORMULAS)
        self.flops: int | None = None
        self.seconds = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Start counting, or the clock."""
        if self._number == 0 and self._counted:
            self._counter.__enter__()
        if self._number == self._warmup:
            wait(trainer.strategy.root_device)
            self._began = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Stop counting."""
        self._number += 1
        if self._number == self._counted:
            self._counter.__exit__(None, None, None)
            self.flops = self._counter.get_total_flops() // self._counted

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Stop the clock."""
        wait(trainer.strategy.root_device)
        self.seconds = (time.perf_counter() - self._began) / (self._number - self._warmup)


def wait(device: torch.device) -> None:
    """Until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def train(
    module: TrainingModule,
    batches: Sequence[Any],
    *,
    warmup: int,
    steps: int,
    counts_flops: bool = False,
    callbacks: Sequence[L.Callback] = (),
    micro_batches: int = 1,
    **options: Any,
) -> Timing:
    """Fit a module and time it.

    Args:
        module: as a configuration builds it.
        batches: micro-batches, taken in turns.
        warmup: training steps before those that are timed.
        steps: that are timed.
        counts_flops: once of every batch, while it warms up.
        callbacks: of the trainer.
        micro_batches: of a training step, on this device.
        options: of the trainer.
    """
    clock = Clock(warmup * micro_batches, len(batches) if counts_flops else 0)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        max_steps=warmup + steps,
        max_epochs=-1,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        callbacks=[*callbacks, clock],
        **(quiet | options),
    )
    on_cuda = trainer.strategy.root_device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    trainer.fit(module, MadeUpData(batches, (warmup + steps) * micro_batches))
    peak = torch.cuda.max_memory_allocated() / GIB if on_cuda else None
    return Timing(clock.seconds, clock.flops, peak)
