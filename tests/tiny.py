"""Models small enough to train in a test."""

from typing import Any

from illume_lightning.nn.dualvitok import DualViTok
from illume_lightning.nn.noise import TokenNoise
from illume_lightning.nn.pixel import PixelDecoder, PixelEncoder
from illume_lightning.nn.semantic import QwenVisionTower, SemanticDecoder, SemanticEncoder
from illume_lightning.nn.simvq import SimVQ


def build_tiny(semantic: bool = True, pixel: bool = True, noise: TokenNoise | None = None) -> DualViTok:
    """Two 8-dimensional branches of 64 and 96 codes."""
    parts: dict[str, Any] = {}
    if semantic:
        parts["semantic_encoder"] = SemanticEncoder(
            QwenVisionTower(1, 32, 2, 48), num_blocks=1, width=32, num_heads=2, code_dim=8
        )
        parts["semantic_quantizer"] = SimVQ(64, 8)
        parts["semantic_decoder"] = SemanticDecoder(8, num_blocks=1, width=32, num_heads=2, out_features=48)
    if pixel:
        parts["pixel_encoder"] = PixelEncoder(8, num_res_blocks=1, latent_channels=8, norm_groups=4)
        parts["pixel_quantizer"] = SimVQ(96, 8)
    decoder = PixelDecoder(
        8, num_res_blocks=1, attention_levels=(), latent_channels=8 * (semantic + pixel), norm_groups=4
    )
    return DualViTok(decoder, noise=noise, **parts)
