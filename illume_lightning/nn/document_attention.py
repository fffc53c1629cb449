"""Attention within documents that are packed into rows: as a mask, as bounds, or document by document.

Shapes: R rows of T tokens, H heads, G heads of keys and values, d channels of a head, L tokens of a document.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

DOCUMENTS = "documents"
"""Name of `document_attention` among transformers' attention functions."""

_SHORT = 512  # tokens up to which scores are held whole: two matrix products beat the fused kernel on a CPU


def document_mask(document_ids: Tensor) -> Tensor:
    """(R, T) -> (R, 1, T, T), true where the second token is of the same document and not later.

    Every token attends to itself, padding too, so no row of the softmax is empty.
    """
    return (document_ids[:, None, :, None] == document_ids[:, None, None, :]).tril()


def document_starts(document_ids: Tensor) -> Tensor:
    """Flat positions at which documents begin, then the end of the last: (R, T) -> (D + 1,) int32.

    A stretch of padding counts as a document.
    """
    starts = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)
    return F.pad(starts.flatten().nonzero().flatten(), (0, 1), value=document_ids.numel()).int()


def document_bounds(document_ids: Tensor) -> dict[str, Any]:
    """Arguments of FlashAttention's variable length kernel: where documents start in the flat batch, (R, T) -> dict."""
    bounds = document_starts(document_ids)
    longest = int(bounds.diff().max())
    return {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    document_lengths: list[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One document after the other: no work for pairs of tokens that don't see each other. For CPUs.

    Args:
        module: the attention layer.
        query: (R, H, T, d).
        key: (R, G, T, d), as value.
        value: see key.
        attention_mask: used where there are no document_lengths, as in generation.
        scaling: of the scores; by default 1 / sqrt(d).
        dropout: none is implemented for documents.
        document_lengths: tokens of the documents in the order in which they stand in the flat batch, R * T in all.
        kwargs: of transformers' other attention functions.

    Returns:
        (R, T, H, d), and no weights.
    """
    if document_lengths is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    documents = [x.transpose(1, 2).flatten(0, 1).split(document_lengths) for x in (query, key, value)]
    attended = [
        _causal(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), scale)
        for q, k, v in zip(*documents, strict=True)
    ]
    joined = torch.cat([part.transpose(0, 1) for part in attended])
    return joined.view(query.shape[0], query.shape[2], *joined.shape[1:]), None


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Of one document, all (H, L, d)."""
    length = query.shape[1]
    if length > _SHORT:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    later = torch.full((length, length), -torch.inf, dtype=query.dtype, device=query.device).triu(1)
    scores = torch.baddbmm(later.expand(query.shape[0], -1, -1), query, key.transpose(1, 2), alpha=scale)
    return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value


AttentionInterface.register(DOCUMENTS, document_attention)
