"""A module that trains in no time, on real pictures of a real plan, and runs that can be stopped and go on."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from tiny_trainer import trainer_for
from torch import Tensor

from callbacks import Checkpoint
from illume_lightning.data.schedule import Phase
from illume_lightning.lit.datamodule import ImageBatch, ImageDataModule, Source
from illume_lightning.lit.sentinel import as_often_as_asked
from illume_lightning.lit.training import TrainingModule

BATCH = 4


class Means(TrainingModule):
    """Learns to be the mean colour, with dropout.

    Args:
        nan_at: training steps whose loss is NaN.
        high_at: those whose loss is a thousand times as high.
        of_rank: the process that these are for; the others see nothing.
        of_micro_batch: within the step.
        gradient_clip: see TrainingModule.
    """

    def __init__(
        self,
        nan_at: Collection[int] = (),
        high_at: Collection[int] = (),
        of_rank: int = 0,
        of_micro_batch: int = 0,
        gradient_clip: float = 1.0,
    ) -> None:
        super().__init__(gradient_clip)
        torch.manual_seed(3)
        self.layer = torch.nn.Linear(3, 3)
        self.nan_at, self.high_at = nan_at, high_at
        self.of_rank, self.of_micro_batch = of_rank, of_micro_batch
        self.trained: list[int] = []

    def training_step(self, batch: ImageBatch, batch_idx: int) -> None:
        if self.leaves_out():
            return
        colour = batch.images.float().mean((2, 3)) / 255
        guess = self.layer(torch.nn.functional.dropout(colour, 0.3))
        loss = (guess - colour).square().mean() * self.factor()
        self.require_finite({"loss": loss}, batch)
        self.log_means({"train/loss": loss})
        self.trained.append(self.global_step)
        self.descend(loss)

    def factor(self) -> float:
        if (self.global_rank, self.micro_batch) != (self.of_rank, self.of_micro_batch):
            return 1.0
        if self.global_step in self.nan_at:
            return float("nan")
        return 1e3 if self.global_step in self.high_at else 1.0

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)]


class Killed(Exception):
    """Stands for SIGKILL: nothing is saved."""


class KillAt(L.Callback):
    """At the start of a training step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise Killed


def data(shapes: Path) -> ImageDataModule:
    return ImageDataModule(
        [Source(str(shapes / "train"))], val_sizes=[], num_workers=0, horizontal_flip=0.0, shuffle_window=8
    )


def train(
    shapes: Path,
    folder: Path,
    *callbacks: L.Callback,
    steps: int = 12,
    micro: int = BATCH,
    every: int = 4,
    devices: int = 1,
    module: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Means, L.Trainer]:
    """What ``illume fit`` does with a run's folder: go on from its last checkpoint, as often as a callback asks."""

    def start() -> tuple[Means, L.Trainer]:
        own = Means(**(module or {}))
        last = folder / "checkpoints" / "last.ckpt"
        saving = Checkpoint(folder / "checkpoints", "{step}", every_n_train_steps=every, save_last=True)
        phases = [Phase(steps, "fixed", 32, BATCH, micro)]
        average = EMAWeightAveraging(decay=0.9)
        trainer = trainer_for(folder, phases, average, *callbacks, saving, devices=devices, **options)
        torch.manual_seed(5)
        trainer.fit(own, data(shapes), ckpt_path=last if last.exists() else None, weights_only=True)
        return own, trainer

    return as_often_as_asked(start)


def saved(folder: Path) -> dict[str, Tensor]:
    """Weights, their averages and moments of the last checkpoint."""
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    found = dict(checkpoint["state_dict"])
    found |= {f"raw {name}": value for name, value in checkpoint["current_model_state"].items()}
    for number, state in checkpoint["optimizer_states"][0]["state"].items():
        found |= {f"{name} {number}": torch.as_tensor(value) for name, value in state.items()}
    return found


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
