"""What the datamodules share: phases from the curriculum, and loaders that read what a plan names."""

import logging
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, TypeVar

import lightning as L

from illume_lightning.data.loader import BatchLoader, PlanBatches, PlanLoader, Reader, StepPlan
from illume_lightning.data.remote import Remote
from illume_lightning.data.schedule import Phase
from illume_lightning.data.store import Store

log = logging.getLogger(__name__)

_Store = TypeVar("_Store", bound=Store)


class PlannedDataModule(L.LightningDataModule):
    """Training batches in the order of a plan, and one evaluation loader for each of `val_names`.

    The phases of training (sizes, batch sizes) come from the `ResolutionCurriculum` callback.

    Args:
        num_workers: processes that read, per device; 0 reads in the training process.
        prefetch: batches that each worker reads ahead.
        pin_memory: page-locked batches, where there is an accelerator.
        shuffle_window: samples of a store among which the order is fully random, see `Plan`.
        seed: of the order and the augmentation.
        remote: how stores in s3:// and gs:// are read.
        max_bad_samples: damaged training records, per device, that others are read in place of; see `Spares`.
            With 0 the first one ends the run: what a seed trains is then never changed by a broken disk.
    """

    def __init__(
        self,
        num_workers: int,
        prefetch: int,
        pin_memory: bool,
        shuffle_window: int,
        seed: int,
        remote: Remote = Remote(),
        max_bad_samples: int = 0,
    ) -> None:
        super().__init__()
        if max_bad_samples < 0:
            raise ValueError(
                f"max_bad_samples {max_bad_samples} is negative; 0 ends the run at the first one"
            )
        self.max_bad_samples = max_bad_samples
        self.num_replaced = 0
        """Samples of training that others were read in place of, in this process."""
        self.num_workers, self.prefetch, self.pin_memory = num_workers, prefetch, pin_memory
        self.shuffle_window, self.seed, self.remote = shuffle_window, seed, remote
        self.val_names: list[str] = []
        """Names of the evaluation loaders made last, in order."""
        self._phases: tuple[Phase, ...] | None = None
        self._plan: Any = None

    def set_curriculum(self, phases: Sequence[Phase]) -> None:
        """Set the phases of training; the ResolutionCurriculum callback does."""
        self._phases = tuple(phases)
        self._plan = None

    @property
    def plan(self) -> Any:
        """The plan of the run.

        Raises:
            ValueError: if there are no phases or no training data.
        """
        if self._plan is None:
            if self._phases is None:
                raise ValueError(
                    "there are no phases to train by; add the ResolutionCurriculum callback to the trainer"
                )
            if not self._has_training_data():
                raise ValueError("there are no training data; list stores under `train`")
            self._plan = self._make_plan(self._phases)
        return self._plan

    def train_dataloader(self) -> PlanLoader:
        """This device's training batches, from the resumed step to the end of the run."""
        assert self.trainer is not None
        trainer = self.trainer
        if trainer.is_global_zero:
            log.info(self.plan.describe())
        return PlanLoader(
            self._training_reader(),
            PlanBatches(self.plan, *replica(trainer)),
            finished_steps=lambda: trainer.global_step,
            fingerprint=self._fingerprint(),
            max_bad_samples=self.max_bad_samples,
            **self._options(),
        )

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Count the samples that were replaced, under ``data/replaced``, where there are any."""
        damages = getattr(batch, "damages", ())
        if damages:
            assert self.trainer is not None
            self.num_replaced += len(damages)
            for logger in self.trainer.loggers:
                logger.log_metrics({"data/replaced": self.num_replaced}, self.trainer.global_step)
        return batch

    def val_dataloader(self) -> list[BatchLoader]:
        """One loader for each of `val_names`."""
        return self._evaluation_loaders("validate")

    def test_dataloader(self) -> list[BatchLoader]:
        """One loader for each of `val_names`."""
        return self._evaluation_loaders("test")

    def predict_dataloader(self) -> list[BatchLoader]:
        """One loader for each of `val_names`."""
        return self._evaluation_loaders("predict")

    @abstractmethod
    def stores(self) -> list[Store]:
        """All stores that have been opened."""

    @abstractmethod
    def _has_training_data(self) -> bool: ...

    @abstractmethod
    def _make_plan(self, phases: Sequence[Phase]) -> StepPlan: ...

    @abstractmethod
    def _training_reader(self) -> Reader: ...

    @abstractmethod
    def _evaluation_loaders(self, stage: str) -> list[BatchLoader]: ...

    @abstractmethod
    def _fingerprint(self) -> str:
        """Of what decides which samples are read, and how."""

    def _options(self) -> dict[str, Any]:
        """Of every loader."""
        has_accelerator = self.trainer is not None and self.trainer.strategy.root_device.type != "cpu"
        return {
            "num_workers": self.num_workers,
            "prefetch": self.prefetch,
            "pin_memory": self.pin_memory and has_accelerator,
        }


def open_store(kind: type[_Store], path: str, remote: Remote = Remote()) -> _Store:
    """A store with something in it.

    Args:
        kind: its class.
        path: its folder or address.
        remote: how it is read, if it is not on this machine.

    Raises:
        FileNotFoundError: if there is none; says how to make one.
        ValueError: if it is empty.
    """
    try:
        store = kind(path, remote)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} (`illume prepare` makes stores)") from error
    if not len(store):
        raise ValueError(f"{path} has no records; make it again with `illume prepare`")
    if not store.has_checks:
        log.warning(
            "%s was prepared by an older version, and damage to its pictures would go unnoticed: `illume prepare "
            "check %s` looks for it once and adds what later reading is checked by",
            *(path, path),
        )
    return store


def replica(trainer: L.Trainer | None) -> tuple[int, int]:
    """Number of this device among those that read different data, and how many there are."""
    sampler = None if trainer is None else trainer.distributed_sampler_kwargs
    return (0, 1) if sampler is None else (sampler["rank"], sampler["num_replicas"])
