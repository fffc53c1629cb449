"""Speed in the progress bar and the logs."""

import time
from typing import Any

import lightning as L
from torch import Tensor

from illume_lightning.data.packed_batch import PackedBatch


class Throughput(L.Callback):
    """Log ``speed/images_per_s``: pictures of all ranks over wall time since the last log, loader included.

    For packed conversations ``speed/samples_per_s`` and, without padding, ``speed/tokens_per_s`` instead.
    """

    def __init__(self) -> None:
        self._samples = 0
        self._tokens: int | Tensor = 0
        self._since = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._restart()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validation does not count as training time."""
        self._restart()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count, and log as often as the trainer logs."""
        self._samples += len(batch.index) * trainer.world_size
        is_packed = isinstance(batch, PackedBatch)
        if is_packed:
            # Stays on the device: reading it would wait for every step.
            self._tokens = self._tokens + (batch.document_ids >= 0).sum()
        if (batch_idx + 1) % trainer.log_every_n_steps:
            return
        tokens = int(self._tokens) * trainer.world_size
        seconds = max(time.perf_counter() - self._since, 1e-9)
        name = "samples" if is_packed else "images"
        pl_module.log(f"speed/{name}_per_s", self._samples / seconds, prog_bar=True)
        if is_packed:
            pl_module.log("speed/tokens_per_s", tokens / seconds)
        self._restart()

    def _restart(self) -> None:
        self._samples = self._tokens = 0
        self._since = time.perf_counter()
