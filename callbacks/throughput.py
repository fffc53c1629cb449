"""Speed in the progress bar and the logs."""

import time

import lightning as L

from illume_lightning.lit.datamodule import ImageBatch


class Throughput(L.Callback):
    """Log ``speed/images_per_s``: pictures of all ranks over wall time since the last log, loader included."""

    def __init__(self) -> None:
        self._images = 0
        self._since = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._images, self._since = 0, time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validation does not count as training time."""
        self._images, self._since = 0, time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: ImageBatch,
        batch_idx: int,
    ) -> None:
        """Count, and log as often as the trainer logs."""
        self._images += batch.images.shape[0] * trainer.world_size
        if (batch_idx + 1) % trainer.log_every_n_steps:
            return
        now = time.perf_counter()
        pl_module.log("speed/images_per_s", self._images / max(now - self._since, 1e-9), prog_bar=True)
        self._images, self._since = 0, now
