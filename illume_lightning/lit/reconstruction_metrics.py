"""Metrics of reconstructed pictures, one set per picture size."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
from torchmetrics.utilities import dim_zero_cat

from illume_lightning.lit.codebook_usage import CodebookUsage
from illume_lightning.nn.dualvitok import DualViTokOutput
from illume_lightning.nn.semantic import SemanticEncoder

Distance = Callable[[Tensor, Tensor], Tensor]
"""Distances (B,) between pictures (B, 3, H, W) in [-1, 1]: LPIPS, or any other."""


def tower_distance(encoder: SemanticEncoder, pictures: Tensor, others: Tensor) -> Tensor:
    """Mean cosine distance of the text-aligned tower's features, 0 to 2: a learned distance without LPIPS' weights.

    Args:
        encoder: a tokenizer's.
        pictures: (B, 3, H, W) in [-1, 1].
        others: what they are compared with, one by one.

    Returns:
        (B,).
    """
    (_, a), (_, b) = encoder(pictures), encoder(others)
    return 1 - F.cosine_similarity(a.float(), b.float(), dim=1).mean((1, 2))


class FrechetDistance(Metric):
    """Frechet distance of two sets of pictures' features, as normal distributions (FID; Heusel et al. 2017).

    Features are kept in fp32 on their device, 8 KiB for a picture of each set with Inception's 2048. What is made of
    them is computed in fp64 on the CPU, as NPUs have none.

    Args:
        network: uint8 pictures (B, 3, H, W) -> features (B, F).
    """

    full_state_update = False
    real: list[Tensor]
    fake: list[Tensor]

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        for name in ("real", "fake"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, real: Tensor, fake: Tensor) -> None:
        """Add pictures (B, 3, H, W) in [0, 1] and what is compared with them."""
        for features, pictures in ((self.real, real), (self.fake, fake)):
            features.append(self.network((pictures * 255).round().to(torch.uint8)).float())

    def compute(self) -> Tensor:
        """Distance, () fp32.

        Raises:
            ValueError: if there are not two pictures to compare.
        """
        real, fake = (dim_zero_cat(features).cpu().double() for features in (self.real, self.fake))
        if len(real) < 2:
            raise ValueError(
                f"a Frechet distance of {len(real)} pictures: validate with 2 or more, or leave fid_features out"
            )
        shift = (real.mean(0) - fake.mean(0)).square().sum()
        covariances = torch.cov(real.T), torch.cov(fake.T)
        spread = sum(covariance.trace() for covariance in covariances)
        common = torch.linalg.eigvals(covariances[0] @ covariances[1]).sqrt().real.sum()
        return (shift + spread - 2 * common).float().to(self.device)


class PictureMetrics(nn.Module):
    """PSNR, SSIM, Frechet distance and learned distances of pictures from what they should be.

    Pictures are compared in [0, 1]: PSNR per picture, then averaged; SSIM with data range 1.0 (the official
    release uses 2.0, which inflates it), Gaussian window 11, sigma 1.5.

    Args:
        distances: by the name they are logged under, such as ``lpips``.
        fid_features: feature network of the Frechet distance, or ``None``; one that takes uint8 pictures
            (B, 3, H, W). The distance is named after it, ``rfid`` for Inception.
    """

    def __init__(
        self, distances: dict[str, Distance] | None = None, fid_features: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.psnr = PeakSignalNoiseRatio(data_range=1.0, dim=(1, 2, 3), reduction="elementwise_mean")
        self.ssim = StructuralSimilarityIndexMeasure(data_range=1.0)
        self.distances = {name: (distance, MeanMetric()) for name, distance in (distances or {}).items()}
        self._means = nn.ModuleList(mean for _, mean in self.distances.values())
        self.fid: FrechetDistance | None = None
        self.fid_name = "rfid"
        if fid_features is not None:
            network = type(fid_features).__name__
            self.fid_name = "rfid" if "Inception" in network else f"frechet_{network.lower()}"
            self.fid = FrechetDistance(fid_features)

    @torch.no_grad()
    def update(self, images: Tensor, reconstruction: Tensor) -> None:
        """Add a batch.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            reconstruction: (B, 3, H, W) in [-1, 1].
        """
        real, fake = (images.float() + 1) / 2, (reconstruction.float() + 1) / 2
        self.psnr.update(fake, real)
        # SSIM subtracts squares of means from means of squares: in bf16 nothing is left of the difference.
        with torch.autocast(images.device.type, enabled=False):
            self.ssim.update(fake, real)
        for distance, mean in self.distances.values():
            mean.update(distance(reconstruction, images).mean(), images.shape[0])
        if self.fid is not None:
            self.fid.update(real, fake)

    def compute(self) -> dict[str, Tensor]:
        """All metrics by name, over all ranks; fp32 scalars."""
        values: dict[str, Any] = {"psnr": self.psnr.compute(), "ssim": self.ssim.compute()}
        values |= {name: mean.compute() for name, (_, mean) in self.distances.items()}
        if self.fid is not None:
            values[self.fid_name] = self.fid.compute()
        return {name: value.float() for name, value in values.items()}


class ReconstructionMetrics(nn.Module):
    """A tokenizer's pictures, semantic cosine and codebook health.

    Args:
        codebooks: codebook size of each branch.
        perceptual: LPIPS network, or ``None``.
        fid_features: as for ``PictureMetrics``.
    """

    def __init__(
        self,
        codebooks: dict[str, int],
        perceptual: nn.Module | None = None,
        fid_features: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.pictures = PictureMetrics({} if perceptual is None else {"lpips": perceptual}, fid_features)
        self.cosine = MeanMetric() if "semantic" in codebooks else None
        self.usage = {name: CodebookUsage(size) for name, size in codebooks.items()}
        self._registered = nn.ModuleList(self.usage.values())

    @torch.no_grad()
    def update(self, images: Tensor, reconstruction: Tensor, output: DualViTokOutput) -> None:
        """Add a batch.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            reconstruction: (B, 3, H, W) in [-1, 1].
            output: the forward pass that made it.
        """
        self.pictures.update(images, reconstruction)
        if self.cosine is not None:
            assert output.semantic_reconstruction is not None and output.encoded.semantic_target is not None
            cosine = torch.nn.functional.cosine_similarity(
                output.semantic_reconstruction.float(), output.encoded.semantic_target.float(), dim=1
            )
            self.cosine.update(cosine.mean(), images.shape[0])
        for name, usage in self.usage.items():
            usage.update(getattr(output.encoded.codes, name))

    def compute(self) -> dict[str, Tensor]:
        """All metrics by name, over all ranks; fp32 scalars."""
        values = self.pictures.compute()
        if self.cosine is not None:
            values["semantic_cosine"] = self.cosine.compute().float()
        for name, usage in self.usage.items():
            health = usage.compute()._asdict().items()
            values |= {f"{name}_{field}": value.float() for field, value in health}
        return values
