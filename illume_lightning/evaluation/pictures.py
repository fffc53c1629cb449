"""How much a picture is like another: PSNR, SSIM, and a distance that the text-aligned tower learned."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from illume_lightning.lit.prompts import to_tensor
from illume_lightning.lit.reconstruction_metrics import tower_distance
from illume_lightning.nn.semantic import SemanticEncoder
from illume_lightning.resolution import Size

_MOST = 100.0
"""dB of equal pictures, in place of infinity."""


def psnr(pictures: Tensor, others: Tensor) -> list[float]:
    """Peak signal-to-noise ratio of each pair in dB, at most 100; (B, 3, H, W) in [-1, 1]."""
    values = peak_signal_noise_ratio(
        (pictures.float() + 1) / 2, (others.float() + 1) / 2, data_range=1.0, reduction="none", dim=(1, 2, 3)
    )
    return values.clamp_max(_MOST).tolist()


def ssim(pictures: Tensor, others: Tensor) -> list[float]:
    """Structural similarity of each pair, as `PictureMetrics`; (B, 3, H, W) in [-1, 1]."""
    values = structural_similarity_index_measure(
        (pictures.float() + 1) / 2, (others.float() + 1) / 2, reduction="none", data_range=1.0
    )
    assert isinstance(values, Tensor)
    return values.tolist()


@torch.no_grad()
def tower_distances(
    encoder: SemanticEncoder,
    pairs: Sequence[tuple[Image.Image, Image.Image]],
    sizes: Sequence[Size],
    batch_size: int = 32,
) -> list[float]:
    """`tower_distance` of pairs of any sizes, in their order.

    Args:
        encoder: the tower.
        pairs: to compare.
        sizes: height and width that each pair is brought to.
        batch_size: pairs that are compared at once.
    """
    device = next(encoder.parameters()).device
    found = [0.0] * len(pairs)
    for size in sorted(set(sizes)):
        numbers = [number for number, own in enumerate(sizes) if own == size]
        for start in range(0, len(numbers), batch_size):
            chosen = numbers[start : start + batch_size]
            sides = [
                torch.cat([to_tensor(_resized(pairs[number][side], size)) for number in chosen]).to(device)
                for side in (0, 1)
            ]
            for number, value in zip(chosen, tower_distance(encoder, *sides).tolist(), strict=True):
                found[number] = value
    return found


def _resized(image: Image.Image, size: Size) -> Image.Image:
    height, width = size
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.BICUBIC)
