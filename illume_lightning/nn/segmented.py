"""Embedding and head of the unified vocabulary with text rows and vision rows apart (paper 3.2, Table 1).

Separate parameters: a part is frozen with ``requires_grad = False`` and has its own learning rate, without masks
on gradients. Shapes: Nt text rows, Nv vision rows, D width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SegmentedEmbedding(nn.Module):
    """Token embedding: parameters ``text`` (Nt, D) and ``vision`` (Nv, D).

    Args:
        num_text: Nt; these ids come first.
        num_vision: Nv, unused rows included.
        width: D.
        init_std: standard deviation of the initial rows.
    """

    def __init__(self, num_text: int, num_vision: int, width: int, init_std: float = 0.02) -> None:
        super().__init__()
        self.text = nn.Parameter(torch.empty(num_text, width))
        self.vision = nn.Parameter(torch.empty(num_vision, width))
        for rows in (self.text, self.vision):
            nn.init.normal_(rows, std=init_std)

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        """Rows of text and of vision."""
        return self.text, self.vision

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (...) -> (..., D), without waiting for the device."""
        num_text = self.text.shape[0]
        text = F.embedding(ids.clamp(max=num_text - 1), self.text)
        vision = F.embedding((ids - num_text).clamp(min=0), self.vision)
        return torch.where((ids < num_text)[..., None], text, vision)


class SegmentedHead(nn.Module):
    """Output layer without bias: parameters ``text`` (Nt, D) and ``vision`` (Nv, D), or the embedding's.

    Args:
        embedding: gives the sizes, and the rows where tied.
        tied: use the embedding's rows and have no parameters of its own (Qwen2.5-3B).
        init_std: standard deviation of the initial rows.
    """

    text: Tensor
    vision: Tensor

    def __init__(self, embedding: SegmentedEmbedding, tied: bool = False, init_std: float = 0.02) -> None:
        super().__init__()
        # In a tuple, so that the embedding is not registered as a part of the head too.
        self._tied = (embedding,) if tied else ()
        if not tied:
            self.text = nn.Parameter(torch.empty_like(embedding.text))
            self.vision = nn.Parameter(torch.empty_like(embedding.vision))
            for rows in self.tables:
                nn.init.normal_(rows, std=init_std)

    @property
    def is_tied(self) -> bool:
        """Whether the rows are the embedding's."""
        return bool(self._tied)

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        """Rows of text and of vision, as ``linear_cross_entropy`` takes them."""
        return self._tied[0].tables if self._tied else (self.text, self.vision)

    def logits(
        self,
        hidden: Tensor,
        ids: range | None = None,
        multiply: Callable[[Tensor, Tensor], Tensor] = F.linear,
    ) -> Tensor:
        """Logits of a contiguous range of ids; nothing is computed for the others.

        Args:
            hidden: (..., D).
            ids: the range; all ids where not given.
            multiply: hidden states and rows to logits.

        Returns:
            (..., number of ids).

        Raises:
            ValueError: the range is empty, has steps, or leaves the vocabulary.
        """
        text, vision = self.tables
        num_text, size = len(text), len(text) + len(vision)
        ids = range(size) if ids is None else ids
        if not ids or ids.step != 1 or ids.start < 0 or ids.stop > size:
            raise ValueError(f"logits of {ids}: give a range of ids within 0 to {size - 1}, without steps.")
        parts = text[ids.start : ids.stop], vision[max(ids.start - num_text, 0) : max(ids.stop - num_text, 0)]
        found = [multiply(hidden, rows) for rows in parts if len(rows)]
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1)
