"""Pictures of ``illume predict`` as files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from callbacks.reconstruction_grid import grid, save
from illume_lightning.lit.datamodule import ImageBatch


class PredictionPictures(BasePredictionWriter):
    """Write every picture to ``predictions/<loader>/<record>.png`` in the run's folder.

    ``<loader>`` is the datamodule's name for store and size, ``<record>`` the number in the store. A module
    that makes several pictures of each input gives them names: ``<record>-<name>.png``, and a row of the input
    and all of them, ``<record>-row.png``.
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
        """Write a batch; ``prediction`` is uint8 (B, 3, H, W), or such tensors by name."""
        folder = Path(trainer.default_root_dir) / "predictions" / trainer.datamodule.val_names[dataloader_idx]
        folder.mkdir(parents=True, exist_ok=True)
        for number, index in enumerate(batch.index.tolist()):
            if isinstance(prediction, Tensor):
                save(prediction[number], folder / f"{index:06d}.png")
                continue
            pictures = {name: batch_of[number].cpu() for name, batch_of in prediction.items()}
            for name, picture in pictures.items():
                save(picture, folder / f"{index:06d}-{name}.png")
            save(
                grid([[batch.images[number].cpu(), *pictures.values()]], axis=2),
                folder / f"{index:06d}-row.png",
            )
