"""Training of a small text-aligned vision encoder, the semantic branch's start in worlds that have none."""

import json
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torchmetrics import MeanMetric

from illume_lightning.lit.datamodule import ImageBatch
from illume_lightning.lit.dualvitok import to_float
from illume_lightning.lit.training import TrainingModule
from illume_lightning.nn.contrastive import ImageTextModel, Region


class VisionEncoderModule(TrainingModule):
    """Contrastive training on pictures with captions and, where the data names them, regions with phrases.

    The record's ``meta`` may hold ``regions``: a list of ``[phrase, top, left, bottom, right]`` with edges as
    fractions of the picture. Train without crops and flips (size mode ``any_resolution``), which would move
    them.

    Args:
        model: tower and text encoder.
        optimizer: of all parameters.
        lr_scheduler: stepped once per training step; ``None`` keeps the rate constant.
        region_weight: weight of the region loss beside the caption loss.
        gradient_clip: largest gradient norm; 0 turns clipping off.
    """

    def __init__(
        self,
        model: ImageTextModel,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        region_weight: float = 1.0,
        gradient_clip: float = 0.0,
    ) -> None:
        super().__init__(gradient_clip)
        self.model = model
        self.region_weight = region_weight
        self._optimizer, self._lr_scheduler = optimizer, lr_scheduler
        self._recall: dict[str, MeanMetric] = {}

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[Any]]:
        """One optimizer and, where given, one schedule per step."""
        optimizer = self._optimizer(self.parameters())
        return [optimizer], [] if self._lr_scheduler is None else [self._lr_scheduler(optimizer)]

    def training_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Sigmoid contrastive loss of captions, plus that of regions."""
        regions = regions_of(batch)
        whole, parts = self.model.embed_images(to_float(batch.images), regions)
        caption_loss = self.model.loss(whole, batch.captions)
        self.log("train/caption_loss", caption_loss, prog_bar=True, batch_size=len(batch.captions))
        terms = {"caption_loss": caption_loss}
        if regions and self.region_weight > 0:
            terms["region_loss"] = self.model.loss(parts, [region.phrase for region in regions])
            self.log("train/region_loss", terms["region_loss"], prog_bar=True, batch_size=len(batch.captions))
        self.require_finite(terms, batch)
        self.descend(caption_loss + self.region_weight * terms.get("region_loss", 0))

    def on_validation_start(self) -> None:
        """New metrics."""
        self._recall = {name: MeanMetric().to(self.device) for name in ("caption", "region")}

    def validation_step(self, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Share of pictures, and of regions, whose own text is the nearest one of the batch."""
        regions = regions_of(batch)
        whole, parts = self.model.embed_images(to_float(batch.images), regions)
        self._count("caption", whole, batch.captions)
        if regions:
            self._count("region", parts, [region.phrase for region in regions])

    def _count(self, name: str, images: Tensor, texts: list[str]) -> None:
        distinct = list(dict.fromkeys(texts))
        target = torch.tensor([distinct.index(text) for text in texts], device=images.device)
        nearest = (images @ self.model.text(distinct).T).argmax(1)
        self._recall[name].update((nearest == target).float().mean(), len(texts))

    def on_validation_epoch_end(self) -> None:
        """Log ``val/retrieval/caption`` and ``val/retrieval/region``, each in [0, 1]."""
        for name, metric in self._recall.items():
            self.log(f"val/retrieval/{name}", metric.compute(), prog_bar=True)


def regions_of(batch: ImageBatch) -> list[Region]:
    """The described regions of a batch's pictures; empty where the data names none."""
    return [
        Region(picture, *region)
        for picture, meta in enumerate(batch.metas)
        for region in json.loads(meta or "{}").get("regions", [])
    ]
