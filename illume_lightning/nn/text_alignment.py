"""A small text-aligned vision encoder, trained from nothing where no pretrained one can be had.

The paper's semantic branch starts from a text-aligned ViT. Small worlds train a Qwen2-VL-shaped tower to name the
words of captions, as CatLIP does (arXiv 2404.15653), and of phrases about regions. Where pictures are few this learns
what contrastive pairs don't: the shape of an object, one word of six, is the last thing that a caption's vector needs.
Shapes: B pictures, N texts, W distinct words, D embedding width, C tower features, h w merged grid.
"""

import re
import zlib
from dataclasses import dataclass
from typing import Any

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


class TextAlignment(nn.Module):
    """Vision tower and words in one embedding space; any language that puts spaces between words, no vocabulary.

    Args:
        tower: the vision tower; what the semantic branch later uses.
        num_buckets: rows of the word table; a word's row is its CRC-32 modulo this.
        embed_dim: D.
    """

    def __init__(self, tower: QwenVisionTower, num_buckets: int = 4096, embed_dim: int = 128) -> None:
        super().__init__()
        self.tower = tower
        self.words = nn.Embedding(num_buckets, embed_dim)
        self.project = nn.Linear(tower.out_features, embed_dim)
        self.log_temperature = nn.Parameter(torch.tensor(10.0).log())

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
        exact: dict[str, Any] = {"dtype": torch.float32, "device": images.device}
        edges = torch.tensor([[r.top, r.left, r.bottom, r.right] for r in regions], **exact)
        y, x = (torch.arange(rows, **exact) + 0.5) / rows, (torch.arange(cols, **exact) + 0.5) / cols
        inside_y = (y >= edges[:, :1]) & (y < edges[:, 2:3])
        inside_x = (x >= edges[:, 1:2]) & (x < edges[:, 3:])
        weight = (inside_y.unsqueeze(2) & inside_x.unsqueeze(1)).to(features.dtype)
        weight = weight / weight.sum((1, 2), keepdim=True).clamp_min(1)
        picture = torch.tensor([region.picture for region in regions], device=images.device)
        parts = torch.einsum("rchw,rhw->rc", features[picture], weight)
        return F.normalize(self.project(whole), dim=-1), F.normalize(self.project(parts), dim=-1)

    def loss(self, images: Tensor, texts: list[str], everyones: list[str] | None = None) -> Tensor:
        """Binary cross entropy of which of all texts' words each text has; the others are its negatives.

        Args:
            images: (N, D) unit vectors of pictures or regions.
            texts: N texts.
            everyones: the texts whose words are asked for, where several devices share a batch; by default ``texts``.

        Returns:
            Scalar, the mean over texts of the sum over words; 0 without words.
        """
        logits, has = self._scores(images, texts, everyones)
        return F.binary_cross_entropy_with_logits(logits, has, reduction="none").sum() / max(1, len(texts))

    def recall(self, images: Tensor, texts: list[str]) -> Tensor:
        """Share of each text's words among as many words of all texts that score best, (N,); 1 without words."""
        logits, has = self._scores(images, texts)
        counts = has.sum(1, keepdim=True)
        rank = logits.argsort(1, descending=True).argsort(1)
        return ((rank < counts) * has).sum(1) / counts.squeeze(1).clamp_min(1) + (counts.squeeze(1) == 0)

    def _scores(
        self, images: Tensor, texts: list[str], everyones: list[str] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits of every distinct word, and 1 where a text has it: (N, W) fp32 each."""
        said = [_words(text) for text in texts]
        distinct = sorted(set().union(*map(_words, texts if everyones is None else everyones)))
        rows = [zlib.crc32(word.encode()) % self.words.num_embeddings for word in distinct]
        has = torch.tensor([[word in words for word in distinct] for words in said]).float()
        vectors = F.normalize(self.words(torch.tensor(rows, dtype=torch.long, device=images.device)), dim=-1)
        logits = (images @ vectors.T).float() * self.log_temperature.exp()
        return logits, has.view(len(texts), len(distinct)).to(images.device)


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))
