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
from illume_lightning.nn.text_alignment import Region, TextAlignment


class VisionEncoderModule(TrainingModule):
    """Training to name the words of captions and, where the data names them, of phrases about regions.

    The record's ``meta`` may hold ``regions``: a list of ``[phrase, top, left, bottom, right]`` with edges as
    fractions of the picture. Train without crops and flips (size mode ``any_resolution``), which would move
    them.

    Args:
        model: tower and words.
        optimizer: of all parameters.
        lr_scheduler: stepped once per training step; ``None`` keeps the rate constant.
        region_weight: weight of the region loss beside the caption loss.
        gradient_clip: largest gradient norm; 0 turns clipping off.
    """

    def __init__(
        self,
        model: TextAlignment,
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
        """Words of captions, plus words of regions."""
        if self.leaves_out():
            return
        regions = regions_of(batch)
        whole, parts = self.model.embed_images(to_float(batch.images), regions)
        terms = {"caption_loss": self._loss(whole, batch.captions, self.gather_texts(batch.captions))}
        phrases = [region.phrase for region in regions]
        everyones = self.gather_texts(phrases)
        if everyones and self.region_weight > 0:
            terms["region_loss"] = self._loss(parts, phrases, everyones)
        loss = terms["caption_loss"] + self.region_weight * terms.get("region_loss", 0)
        self.require_finite(terms, batch)
        named = {f"train/{name}": value for name, value in terms.items()}
        self.log_means({"train/loss": loss} | named, on_bar=named)
        self.descend(loss)

    def _loss(self, embedded: Tensor, texts: list[str], everyones: list[str]) -> Tensor:
        """A device's share of the loss of everyone's texts, among the words of them all; the shares' mean is it."""
        share = self.trainer.world_size * len(texts) / len(everyones)
        return share * self.model.loss(embedded, texts, everyones)

    def on_validation_start(self) -> None:
        """New metrics."""
        self._recall = {name: MeanMetric().to(self.device) for name in ("caption", "region")}

    def validation_step(self, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Share of the words of captions, and of regions, that are among the batch's words that score best."""
        regions = regions_of(batch)
        whole, parts = self.model.embed_images(to_float(batch.images), regions)
        self._recall["caption"].update(self.model.recall(whole, batch.captions))
        if regions:
            self._recall["region"].update(self.model.recall(parts, [region.phrase for region in regions]))

    def on_validation_epoch_end(self) -> None:
        """Log ``val/words/caption`` and ``val/words/region``, each in [0, 1]."""
        for name, metric in self._recall.items():
            self.log(f"val/words/{name}", metric.compute(), prog_bar=True)


def regions_of(batch: ImageBatch) -> list[Region]:
    """The described regions of a batch's pictures; empty where the data names none."""
    return [
        Region(picture, *region)
        for picture, meta in enumerate(batch.metas)
        for region in json.loads(meta or "{}").get("regions", [])
    ]
