"""Metrics of reconstructed pictures, one set per picture size."""

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
from torchmetrics.image.fid import FrechetInceptionDistance

from illume_lightning.lit.codebook_usage import CodebookUsage
from illume_lightning.nn.dualvitok import DualViTokOutput


class ReconstructionMetrics(nn.Module):
    """PSNR, SSIM, semantic cosine, LPIPS, Frechet distance and codebook health of reconstructions.

    Pictures are compared in [0, 1]: PSNR per picture, then averaged; SSIM with data range 1.0 (the official
    release uses 2.0, which inflates it), Gaussian window 11, sigma 1.5.

    Args:
        codebooks: codebook size of each branch.
        perceptual: LPIPS network, or ``None``.
        fid_features: feature network of the Frechet distance, or ``None``; one that takes uint8 pictures
            (B, 3, H, W) and has ``num_features``. The distance is named after it, ``rfid`` for Inception.
    """

    def __init__(
        self,
        codebooks: dict[str, int],
        perceptual: nn.Module | None = None,
        fid_features: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.psnr = PeakSignalNoiseRatio(data_range=1.0, dim=(1, 2, 3), reduction="elementwise_mean")
        self.ssim = StructuralSimilarityIndexMeasure(data_range=1.0)
        self.cosine = MeanMetric() if "semantic" in codebooks else None
        self.lpips = MeanMetric() if perceptual is not None else None
        self._perceptual = [perceptual] if perceptual is not None else []
        self.usage = {name: CodebookUsage(size) for name, size in codebooks.items()}
        self._registered = nn.ModuleList(self.usage.values())
        self.fid: FrechetInceptionDistance | None = None
        self.fid_name = "rfid"
        if fid_features is not None:
            network = type(fid_features).__name__
            self.fid_name = "rfid" if "Inception" in network else f"frechet_{network.lower()}"
            self.fid = FrechetInceptionDistance(feature=fid_features)

    @torch.no_grad()
    def update(self, images: Tensor, reconstruction: Tensor, output: DualViTokOutput) -> None:
        """Add a batch.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            reconstruction: (B, 3, H, W) in [-1, 1].
            output: the forward pass that made it.
        """
        real, fake = (images + 1) / 2, (reconstruction + 1) / 2
        self.psnr.update(fake, real)
        self.ssim.update(fake, real)
        if self.lpips is not None:
            self.lpips.update(self._perceptual[0](reconstruction, images).mean(), images.shape[0])
        if self.cosine is not None:
            assert output.semantic_reconstruction is not None and output.encoded.semantic_target is not None
            cosine = torch.nn.functional.cosine_similarity(
                output.semantic_reconstruction.float(), output.encoded.semantic_target.float(), dim=1
            )
            self.cosine.update(cosine.mean(), images.shape[0])
        for name, usage in self.usage.items():
            usage.update(getattr(output.encoded.codes, name))
        if self.fid is not None:
            self.fid.update((real * 255).round().to(torch.uint8), real=True)
            self.fid.update((fake * 255).round().to(torch.uint8), real=False)

    def compute(self) -> dict[str, Tensor]:
        """All metrics by name, over all ranks; fp32 scalars."""
        values: dict[str, Any] = {"psnr": self.psnr.compute(), "ssim": self.ssim.compute()}
        if self.cosine is not None:
            values["semantic_cosine"] = self.cosine.compute()
        if self.lpips is not None:
            values["lpips"] = self.lpips.compute()
        if self.fid is not None:
            values[self.fid_name] = self.fid.compute()
        for name, usage in self.usage.items():
            values |= {f"{name}_{field}": v for field, v in usage.compute()._asdict().items()}
        return {name: value.float() for name, value in values.items()}
