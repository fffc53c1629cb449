"""Pictures of what the tokenizer makes of the validation images."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from PIL import Image
from torch import Tensor

from illume_lightning.lit.datamodule import ImageBatch
from illume_lightning.lit.dualvitok import to_uint8

GAP = 4


class ReconstructionGrid(L.Callback):
    """Write ``pictures/step=<N>/<size>.png`` at every validation: inputs above, reconstructions below.

    ``illume validate`` writes to ``pictures/validate``.

    Args:
        num_pictures: pictures per validation size (the first ones, the same every time).
    """

    def __init__(self, num_pictures: int = 8) -> None:
        self.num_pictures = num_pictures
        self._pairs: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.latest: list[Path] = []

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start anew."""
        self._pairs = {}

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first pictures; ``outputs`` is the reconstruction (B, 3, H, W) in [-1, 1]."""
        pairs = self._pairs.setdefault(dataloader_idx, [])
        missing = self.num_pictures - len(pairs)
        reconstructions = to_uint8(outputs[: max(0, missing)])
        pairs.extend(zip(batch.images[:missing].cpu(), reconstructions.cpu(), strict=False))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the grids, rank 0 only."""
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        name = "validate" if trainer.state.fn == "validate" else f"step={trainer.global_step:06d}"
        folder = Path(trainer.default_root_dir) / "pictures" / name
        folder.mkdir(parents=True, exist_ok=True)
        self.latest = []
        for index, pairs in self._pairs.items():
            path = folder / f"{trainer.datamodule.val_names[index]}.png"
            Image.fromarray(grid(pairs).permute(1, 2, 0).numpy()).save(path)
            self.latest.append(path)


def grid(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Columns of pictures, each over its reconstruction.

    Args:
        pairs: (3, H, W) uint8 pictures and reconstructions; sizes may differ from pair to pair.

    Returns:
        (3, height, width) uint8 on a gray ground.
    """
    heights = [image.shape[1] for image, _ in pairs]
    width = sum(image.shape[2] + GAP for image, _ in pairs) + GAP
    canvas = torch.full((3, 2 * max(heights) + 3 * GAP, width), 128, dtype=torch.uint8)
    left = GAP
    for image, reconstruction in pairs:
        _, h, w = image.shape
        canvas[:, GAP : GAP + h, left : left + w] = image
        top = max(heights) + 2 * GAP
        canvas[:, top : top + h, left : left + w] = reconstruction
        left += w + GAP
    return canvas
