"""A resumed run equals an uninterrupted one bit for bit: random numbers, validations and what is logged."""

import logging
import random
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from illume_lightning.lit.interruption import (
    continue_logs,
    is_validation_due,
    logs_state,
    validate,
    was_killed_at_the_end,
)

log = logging.getLogger(__name__)


class ExactResume(L.Callback):
    """Saves the state of every random number generator of every process, and restores it on resuming.

    Python's, numpy's and torch's generators, and that of the device that the run trains on. The state is restored
    right before the first training batch, after everything else that draws numbers at the start.
    Validation is taken out in the same way: what it draws does not change training, so it makes no
    difference how often a run is validated, or whether it is killed before a validation or after.

    A checkpoint is written before its training step is logged and validated. So the checkpoint has the step's metrics,
    which are logged on resuming, and a validation that is due at it is made then, also that of the last step.

    On another number of processes the run goes on with its freshly seeded generators, and says so.
    """

    def __init__(self) -> None:
        self._saved: list[dict[str, Any]] = []
        self._pending: dict[str, Any] | None = None
        self._of_batch: dict[str, Any] | None = None
        self._of_step: dict[str, Any] | None = None
        self._is_within_step = False
        self._is_resumed = False
        self._at_the_end = False
        self._logs: dict[str, Any] | None = None
        self._device = "cpu"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Note which device draws."""
        self._device = trainer.strategy.root_device.type
        self._is_resumed = self._at_the_end = False

    # -- checkpoints -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The generators of all processes; every process has to call it.

        From within a training step a run goes back to the step's beginning, and so do its generators.
        """
        within = self._of_step if self._is_within_step else None
        mine = _as_saved(within or self._pending or _capture(self._device))
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return {"ranks": [mine]}
        ranks: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(ranks, mine)
        return {"ranks": ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the generators for the first training batch."""
        self._saved = state_dict["ranks"]

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remember what is logged, and what is still to be."""
        checkpoint["logs"] = logs_state(trainer)

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Lead a run that was killed after its last training step to its end once more."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._is_resumed, self._logs = True, checkpoint.get("logs")
        self._at_the_end = was_killed_at_the_end(trainer, checkpoint["global_step"])
        if self._at_the_end:
            trainer.fit_loop.epoch_loop.max_steps += 1  # else Lightning's loop would not even begin

    # -- training --------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Pick this process's generators; log and validate what is owed."""
        self._of_batch = self._of_step = None
        self._is_within_step = False
        saved, self._saved = self._saved, []
        if len(saved) == trainer.world_size:
            self._pending = self._of_step = saved[trainer.global_rank]
        elif saved:
            log.warning(
                "the checkpoint is of %d processes and there are %d: the data go on exactly, dropout and "
                "noise with fresh random numbers",
                len(saved),
                trainer.world_size,
            )
        if self._is_resumed:
            self._go_on(trainer)

    def _go_on(self, trainer: L.Trainer) -> None:
        if self._at_the_end:
            trainer.fit_loop.epoch_loop.max_steps -= 1
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                # Else it would write that of this step again, from within the next step.
                callback._last_global_step_saved = trainer.global_step
                callback._last_checkpoint_saved = str(trainer.ckpt_path)
        if self._logs is not None:
            continue_logs(trainer, self._logs)
        if is_validation_due(trainer):
            validate(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Restore the generators, after a resume or a validation."""
        if self._pending is not None:
            _restore(self._pending, self._device)
            self._pending = None
        if self._of_step is None:
            self._of_step = _capture(self._device)
        self._is_within_step = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember the generators, as a validation's loaders draw from them before anyone is told of it."""
        self._of_batch = _capture(self._device)
        if getattr(pl_module, "is_last_micro_batch", True):
            self._of_step, self._is_within_step = self._of_batch, False

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Mark the generators as those to go on with."""
        if self._pending is None:
            self._pending = self._of_batch


def _capture(device: str) -> dict[str, Any]:
    """All generators of this process, as fast as can be."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    module = _device_module(device)
    if module is not None:
        state |= {"device": module.get_rng_state(), "device_type": device}
    return state


def _as_saved(state: dict[str, Any]) -> dict[str, Any]:
    """The same in types that a `weights_only` load accepts."""
    name, keys, *rest = state["numpy"]
    return {**state, "numpy": [name, np.asarray(keys).tolist(), *rest]}


def _restore(state: dict[str, Any], device: str) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    module = _device_module(device)
    # Another kind of device draws by another rule.
    if module is not None and state.get("device_type") == device:
        module.set_rng_state(state["device"])


def _device_module(device: str) -> Any:
    """`torch.cuda`, `torch.npu`, ...; none of the CPU, and where there is no generator."""
    module = None if device == "cpu" else torch.get_device_module(device)
    return module if hasattr(module, "get_rng_state") else None
