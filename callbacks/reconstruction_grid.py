"""Pictures of what a module makes of the validation images."""

import os
from collections.abc import Sequence
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
    """Write ``pictures/step=<N>/<size>.png`` at every validation: inputs above, what became of them below.

    ``illume validate`` writes to ``pictures/validate``.

    Args:
        num_pictures: pictures per validation size (the first ones, the same every time).
    """

    def __init__(self, num_pictures: int = 8) -> None:
        self.num_pictures = num_pictures
        self._columns: dict[int, list[list[Tensor]]] = {}
        self.latest: list[Path] = []

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start anew."""
        self._columns = {}

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first pictures; ``outputs`` are (B, 3, H, W) in [-1, 1], or several such by name."""
        columns = self._columns.setdefault(dataloader_idx, [])
        missing = max(0, self.num_pictures - len(columns))
        made = [outputs] if isinstance(outputs, Tensor) else list(outputs.values())
        rows = [batch.images[:missing], *(to_uint8(pictures[:missing]) for pictures in made)]
        columns.extend([list(column) for column in zip(*(row.cpu() for row in rows), strict=True)])

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the grids, rank 0 only."""
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        name = "validate" if trainer.state.fn == "validate" else f"step={trainer.global_step:06d}"
        folder = Path(trainer.default_root_dir) / "pictures" / name
        folder.mkdir(parents=True, exist_ok=True)
        self.latest = []
        for index, columns in self._columns.items():
            path = folder / f"{trainer.datamodule.val_names[index]}.png"
            save(grid(columns, axis=1), path)
            self.latest.append(path)


def grid(groups: Sequence[Sequence[Tensor]], axis: int) -> Tensor:
    """Groups of pictures that belong together, on a gray ground.

    Args:
        groups: (3, H, W) uint8 pictures; sizes may differ.
        axis: 1 puts a group's pictures below each other and the groups side by side, 2 the other way.

    Returns:
        (3, height, width) uint8.
    """
    if axis == 2:
        return grid([[picture.mT for picture in group] for group in groups], axis=1).mT
    rows = [max(group[row].shape[1] for group in groups) for row in range(len(groups[0]))]
    widths = [max(picture.shape[2] for picture in group) for group in groups]
    height, width = (sum(sides) + GAP * (len(sides) + 1) for sides in (rows, widths))
    canvas = torch.full((3, height, width), 128, dtype=torch.uint8)
    left = GAP
    for group, group_width in zip(groups, widths, strict=True):
        top = GAP
        for picture, row in zip(group, rows, strict=True):
            canvas[:, top : top + picture.shape[1], left : left + picture.shape[2]] = picture
            top += row + GAP
        left += group_width + GAP
    return canvas


def save(picture: Tensor, path: Path) -> None:
    """Write (3, H, W) uint8 as a PNG that is there in full or not at all."""
    partial = path.with_name(path.name + ".partial")
    Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(partial, format="PNG")
    os.replace(partial, path)
