"""Checkpoints in steps, of the end, and of where a run was told to stop."""

import os
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from illume_lightning.lit.durable_checkpoints import BackgroundCheckpointIO, DurableCheckpointIO
from illume_lightning.lit.stop_signals import StopSignals


class Checkpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, for runs that are stopped, killed and resumed.

    - It also saves after the last training step, whatever the interval, from which the next stage starts.
    - At SIGTERM it saves at the end of the training step in progress, and the run ends.
    - ``last.ckpt`` is a second name of the file of the same step, so it costs neither time nor disk.
    - With ``save_top_k: 1`` and no ``monitor`` the file before the newest is kept too, in case that is damaged: two
      checkpoints on the disk, three while one is written.
    """

    _earlier_model_path = ""
    _finished_steps = 0
    _signals: StopSignals | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen to signals."""
        super().on_train_start(trainer, pl_module)
        if trainer.received_sigterm:
            raise SIGTERMException
        self._finished_steps = trainer.global_step
        self._signals = StopSignals(trainer, lambda: self._last_global_step_saved == trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where it is due."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step == self._finished_steps:  # within a step of several batches
            return
        self._finished_steps = trainer.global_step
        stops = self._signals is not None and self._signals.agreed()
        is_last = trainer.global_step == trainer.max_steps
        if (is_last or stops) and not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
        if stops and self._signals is not None:
            self._signals.stop()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Wait for what is still being written: others read it now."""
        super().on_train_end(trainer, pl_module)
        if isinstance(trainer.strategy.checkpoint_io, BackgroundCheckpointIO):
            trainer.strategy.checkpoint_io.finish()

    def state_dict(self) -> dict[str, Any]:
        """Lightning's, and the file before the newest."""
        return {**super().state_dict(), "earlier_model_path": self._earlier_model_path}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with them."""
        super().load_state_dict(state_dict)
        if state_dict.get("dirpath") == self.dirpath:
            self._earlier_model_path = state_dict.get("earlier_model_path", "")

    def _save_topk_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if self.save_last:  # the file is last.ckpt too, so that it has to know of that
            self.last_model_path = self.format_checkpoint_name(monitor_candidates, self.CHECKPOINT_NAME_LAST)
        super()._save_topk_checkpoint(trainer, monitor_candidates)

    def _save_none_monitor_checkpoint(
        self, trainer: L.Trainer, monitor_candidates: dict[str, Tensor]
    ) -> None:
        path, old = self.format_checkpoint_name(monitor_candidates), ""
        if path != self.best_model_path:
            old, self._earlier_model_path = self._earlier_model_path, self.best_model_path
            self.best_model_path = path
        self._save_checkpoint(trainer, path)
        if self.save_top_k == 1 and old and self._should_remove_checkpoint(trainer, old, path):
            self._remove_checkpoint(trainer, old)

    def _save_last_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if not self.save_last:
            return
        # Always of this name: a run goes on from it, and the next stage reads it.
        path = self.format_checkpoint_name(monitor_candidates, self.CHECKPOINT_NAME_LAST)
        self.last_model_path, saved = path, self._last_checkpoint_saved
        is_saved = self._last_global_step_saved == trainer.global_step and saved not in ("", path)
        io = trainer.strategy.checkpoint_io
        can_link = isinstance(io, DurableCheckpointIO | BackgroundCheckpointIO)
        # FSDP2's folders have no links.
        if is_saved and can_link and trainer.strategy.broadcast(not os.path.isdir(saved)):
            if trainer.is_global_zero:
                io.link_checkpoint(saved, path)
            trainer.strategy.barrier("last.ckpt")
        else:
            self._save_checkpoint(trainer, path)
