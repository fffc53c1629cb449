"""Reconstructions of ``illume predict`` as files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from PIL import Image

from illume_lightning.lit.datamodule import ImageBatch


class PredictionPictures(BasePredictionWriter):
    """Write every reconstruction to ``predictions/<loader>/<record>.png`` in the run's folder.

    ``<loader>`` is the datamodule's name for store and size, ``<record>`` the number in the store.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write a batch; ``prediction`` is uint8 (B, 3, H, W)."""
        folder = Path(trainer.default_root_dir) / "predictions" / trainer.datamodule.val_names[dataloader_idx]
        folder.mkdir(parents=True, exist_ok=True)
        for image, index in zip(prediction.cpu(), batch.index.tolist(), strict=True):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index:06d}.png")
