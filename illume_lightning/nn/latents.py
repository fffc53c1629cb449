"""Pictures to latents and back, for the diffusion decoder."""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from illume_lightning.nn.casting import KeepsType


class VAELatents(KeepsType):
    """SDXL's autoencoder, in fp32 where its config asks for it. An eighth of the size in both directions.

    It keeps its type in a model whose weights are cast: latents are those that a cache has.

    Args:
        pretrained: a diffusers pipeline (its folder ``vae``), a folder of a VAE alone, or a hub name.
        vae: a ready one instead.

    Raises:
        ValueError: if neither or both are given.
    """

    def __init__(self, pretrained: str | None = None, vae: AutoencoderKL | None = None) -> None:
        super().__init__()
        if (pretrained is None) == (vae is None):
            raise ValueError("VAELatents takes either pretrained or vae")
        if vae is None:
            assert pretrained is not None
            vae = _load_vae(pretrained)
        self.vae = vae
        self.channels: int = vae.config.latent_channels
        self.factor: int = 2 ** (len(vae.config.block_out_channels) - 1)
        self.requires_grad_(False)

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, C, H/8, W/8): the posterior's mode, so that cached latents equal these."""
        with torch.autocast(images.device.type, enabled=False):
            latents = self.vae.encode(images.to(self.vae.dtype)).latent_dist.mode().float()
        mean, std = self._statistics(latents)
        return (latents - mean) / std * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, H/8, W/8) -> (B, 3, H, W), about [-1, 1]."""
        mean, std = self._statistics(latents)
        latents = latents / self.vae.config.scaling_factor * std + mean
        with torch.autocast(latents.device.type, enabled=False):
            return self.vae.decode(latents.to(self.vae.dtype)).sample.float()

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Per-channel mean and standard deviation (1, C, 1, 1), where the VAE's config has them."""
        mean = getattr(self.vae.config, "latents_mean", None)
        std = getattr(self.vae.config, "latents_std", None)
        shape = (1, self.channels, 1, 1)
        return (
            latents.new_zeros(shape) if mean is None else latents.new_tensor(mean).view(shape),
            latents.new_ones(shape) if std is None else latents.new_tensor(std).view(shape),
        )


class SpaceToDepth(nn.Module):
    """Every ``factor`` x ``factor`` pixels are one latent: without loss, for worlds without a VAE.

    Args:
        factor: a power of two.
    """

    def __init__(self, factor: int = 4) -> None:
        super().__init__()
        self.factor = factor
        self.channels = 3 * factor**2

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 3 f^2, H/f, W/f)."""
        return F.pixel_unshuffle(images, self.factor)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 3 f^2, H/f, W/f) -> (B, 3, H, W)."""
        return F.pixel_shuffle(latents, self.factor)


def _load_vae(pretrained: str) -> AutoencoderKL:
    from pathlib import Path

    has_subfolder = not Path(pretrained).is_dir() or (Path(pretrained) / "vae").is_dir()
    return AutoencoderKL.from_pretrained(pretrained, subfolder="vae" if has_subfolder else None)
