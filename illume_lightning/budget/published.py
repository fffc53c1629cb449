"""The sizes of published networks that a run downloads, without their weights."""

import warnings

import torch
from diffusers import AutoencoderKL
from torch import nn

from illume_lightning.budget.dry_step import default_type
from illume_lightning.nn.latents import VAELatents
from illume_lightning.nn.losses import Perceptual


def sdxl_latents() -> VAELatents:
    """SDXL's autoencoder (sizes of the ``vae/config.json`` of stabilityai/stable-diffusion-xl-base-1.0), in fp32."""
    with default_type(torch.float32):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
            scaling_factor=0.13025,
        )
    return VAELatents(vae=vae)


class UntrainedPerceptual(Perceptual):
    """LPIPS on VGG16 that needs no file; its distances mean nothing."""

    def __init__(self) -> None:
        import lpips

        nn.Module.__init__(self)
        with warnings.catch_warnings():
            # The package passes torchvision arguments of an older version.
            warnings.simplefilter("ignore")
            self.network = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
        self.requires_grad_(False)
        self.eval()
