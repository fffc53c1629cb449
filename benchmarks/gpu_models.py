"""The models that gpu.py measures: of the paper's size, or toys of the same kind."""

from typing import Any

import torch
from diffusers import DDPMScheduler

from illume_lightning.budget.published import UntrainedPerceptual, sdxl_latents
from illume_lightning.lit.diffusion_decoder import DiffusionDecoderModule
from illume_lightning.lit.dualvitok import DualViTokModule
from illume_lightning.lit.mllm import MLLMStage2
from illume_lightning.nn.checkpoints import build_official
from illume_lightning.nn.diffusion_decoder import DiffusionDecoder, build_unet
from illume_lightning.nn.discriminator import PatchDiscriminator
from illume_lightning.nn.dualvitok import DualViTok
from illume_lightning.nn.latents import SpaceToDepth
from illume_lightning.nn.losses import DualViTokLoss
from illume_lightning.nn.mllm import MLLM, build_trunk
from illume_lightning.nn.pixel import PixelEncoder
from illume_lightning.nn.semantic import QwenVisionTower
from illume_lightning.vocabulary import Vocabulary

TRUNKS = {
    "0.5B": {"width": 896, "depth": 24, "num_heads": 14, "num_kv_heads": 2, "mlp_width": 4864},
    "3B": {"width": 2048, "depth": 36, "num_heads": 16, "num_kv_heads": 2, "mlp_width": 11008},
}
"""Qwen2.5's."""

_TOY_TRUNK = {"width": 32, "depth": 1, "num_heads": 4, "num_kv_heads": 2, "mlp_width": 64}
_TOY_TOWER = {"depth": 1, "embed_dim": 64, "num_heads": 4, "hidden_size": 64}
_TOY_TOKENIZER = {
    "semantic_encoder": {"num_blocks": 1, "embed_dim": 64},
    "semantic_decoder": {"num_blocks": 1, "embed_dim": 64, "output_channels": 64},
    "semantic_quantizer": {"codebook_size": 64},
    "pixel_quantizer": {"codebook_size": 96},
    "pixel_encoder": {"ch": 32, "num_res_blocks": 1},
    "pixel_decoder": {"ch": 32, "num_res_blocks": 1},
}


def tokenizer(is_toy: bool) -> DualViTok:
    """The published one's sizes, or a toy."""
    return build_official(_TOY_TOKENIZER, _TOY_TOWER) if is_toy else build_official()


def dualvitok(is_toy: bool, **options: Any) -> DualViTokModule:
    """With every loss, the adversarial one from the first step."""
    loss = DualViTokLoss(adversarial_start=0)
    discriminator = PatchDiscriminator(width=8) if is_toy else PatchDiscriminator()
    return DualViTokModule(tokenizer(is_toy), loss, UntrainedPerceptual(), discriminator, **options)


def decoder(is_toy: bool, side: int, **options: Any) -> DiffusionDecoderModule:
    """SDXL's UNet and VAE behind the frozen tokenizer, for pictures of one size."""
    if is_toy:
        unet, latents = build_unet(48, 64, (32, 64), (0, 1), 16, 32, 32, 32, 8, 1), SpaceToDepth(4)
    else:
        unet, latents = build_unet(), sdxl_latents()
    with torch.device("cpu"):
        scheduler = DDPMScheduler()
    model = DiffusionDecoder(unet, latents, scheduler, sizes=[(side, side)])
    module = DiffusionDecoderModule(model, tokenizer="", **options)
    module.fixed["tokenizer"] = tokenizer(is_toy).requires_grad_(False).eval()
    return module


def mllm(is_toy: bool, trunk: str, **options: Any) -> MLLMStage2:
    """A trunk of Qwen2.5's with the tokenizer's towers, tied as those are."""
    if is_toy:
        words = Vocabulary(50, semantic_codes=64, pixel_codes=96, size_step=16, num_sizes=8)
        tower, encoder = QwenVisionTower(1, 32, 2, 48), PixelEncoder(8, latent_channels=8, norm_groups=4)
    else:
        words, tower, encoder = Vocabulary(), QwenVisionTower(), PixelEncoder()
    built = build_trunk(**(_TOY_TRUNK if is_toy else TRUNKS[trunk]))  # type: ignore[arg-type]
    return MLLMStage2(MLLM(built, words, tower, encoder, tied=True), **options)
