"""A small text-aligned vision encoder, trained from nothing where no pretrained one can be had.

The paper's semantic branch starts from a text-aligned ViT. Small worlds train a Qwen2-VL-shaped tower with the
sigmoid contrastive loss of SigLIP on whole pictures and captions, and on regions and phrases.
Shapes: B pictures, T texts, L words, D embedding width, C tower features, h w merged grid.
"""

import re
import zlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from illume_lightning.nn.semantic import QwenVisionTower


@dataclass(frozen=True)
class Region:
    """A described part of a picture; edges are fractions of its height and width in [0, 1]."""

    picture: int
    phrase: str
    top: float
    left: float
    bottom: float
    right: float


class TextEncoder(nn.Module):
    """Bidirectional transformer over hashed words: any language that puts spaces between words, no vocabulary.

    Args:
        width: channels of a layer.
        num_layers: transformer layers.
        num_heads: attention heads.
        num_buckets: rows of the word table; a word's row is its CRC-32 modulo this.
        max_words: longer texts are cut.
        embed_dim: channels D of a text embedding.
    """

    def __init__(
        self,
        width: int = 128,
        num_layers: int = 2,
        num_heads: int = 4,
        num_buckets: int = 4096,
        max_words: int = 48,
        embed_dim: int = 128,
    ) -> None:
        super().__init__()
        self.num_buckets, self.max_words, self.embed_dim = num_buckets, max_words, embed_dim
        self.words = nn.Embedding(num_buckets + 1, width, padding_idx=0)
        self.positions = nn.Parameter(0.02 * torch.randn(max_words, width))
        layer = nn.TransformerEncoderLayer(
            width, num_heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.project = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, embed_dim))

    def forward(self, texts: list[str]) -> Tensor:
        """T texts -> unit vectors (T, D)."""
        rows = [
            [1 + zlib.crc32(word.encode()) % self.num_buckets for word in re.findall(r"\w+", text.lower())]
            for text in texts
        ]
        length = max(1, min(self.max_words, max(map(len, rows), default=1)))
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row[:length], dtype=torch.long)[:length]
        ids = ids.to(self.positions.device)
        padding = ids == 0
        # An empty text keeps one position, so that attention has something to attend to.
        padding[:, 0] = False
        x = self.layers(self.words(ids) + self.positions[:length], src_key_padding_mask=padding)
        keep = (~padding).unsqueeze(-1).to(x.dtype)
        return F.normalize(self.project((x * keep).sum(1) / keep.sum(1)), dim=-1)


class ImageTextModel(nn.Module):
    """Vision tower and text encoder in one embedding space.

    Args:
        tower: the vision tower; what the semantic branch later uses.
        text: the text encoder.
    """

    def __init__(self, tower: QwenVisionTower, text: TextEncoder) -> None:
        super().__init__()
        self.tower = tower
        self.text = text
        self.project = nn.Linear(tower.out_features, text.embed_dim)
        # SigLIP's start: temperature 10, bias -10, since almost all pairs are negative.
        self.log_temperature = nn.Parameter(torch.tensor(10.0).log())
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def embed_images(self, images: Tensor, regions: list[Region]) -> tuple[Tensor, Tensor]:
        """Embed pictures and regions of them.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            regions: R parts of these pictures.

        Returns:
            Unit vectors (B, D) from the mean of each picture's features, and (R, D) from the mean of the
            merged cells whose centre lies in the region.
        """
        features = self.tower.features(images)
        whole = features.mean((2, 3))
        rows, cols = features.shape[-2:]
        if not regions:
            return F.normalize(self.project(whole), dim=-1), whole.new_zeros(0, self.project.out_features)
        edges = torch.tensor([[r.top, r.left, r.bottom, r.right] for r in regions], device=images.device)
        y = (torch.arange(rows, device=images.device) + 0.5) / rows
        x = (torch.arange(cols, device=images.device) + 0.5) / cols
        inside_y = (y >= edges[:, :1]) & (y < edges[:, 2:3])
        inside_x = (x >= edges[:, 1:2]) & (x < edges[:, 3:])
        weight = (inside_y.unsqueeze(2) & inside_x.unsqueeze(1)).to(features.dtype)
        weight = weight / weight.sum((1, 2), keepdim=True).clamp_min(1)
        picture = torch.tensor([region.picture for region in regions], device=images.device)
        parts = torch.einsum("rchw,rhw->rc", features[picture], weight)
        return F.normalize(self.project(whole), dim=-1), F.normalize(self.project(parts), dim=-1)

    def loss(self, images: Tensor, texts: list[str]) -> Tensor:
        """Sigmoid contrastive loss (SigLIP) of N image or region embeddings and their N texts.

        Args:
            images: (N, D) unit vectors.
            texts: N texts; equal texts are positives of one another.

        Returns:
            Scalar, the mean over images of the summed pair losses.
        """
        logits = images @ self.text(texts).T * self.log_temperature.exp() + self.bias
        ids = torch.tensor([zlib.crc32(text.encode()) for text in texts], device=logits.device)
        sign = torch.where(ids[:, None] == ids[None, :], 1.0, -1.0)
        return -F.logsigmoid(sign * logits.float()).sum() / len(texts)
