"""Kernels for passes of a few tokens, where all time goes into reading weights and the cache."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, Qwen2Model
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from illume_lightning.nn.matmul import PackedProducts


@contextmanager
def decoding(trunk: Qwen2Model, multiply: PackedProducts) -> Iterator[None]:
    """Run a trunk on a cache: its attention reads keys and values once, and its linear layers multiply so.

    FlashAttention's kernels for packed sequences can't read the cache; torch's attention can.
    """
    before = trunk.config._attn_implementation
    trunk.config._attn_implementation = _NAME
    layers = [layer for layer in trunk.modules() if type(layer) is nn.Linear] if multiply.is_on else []
    for layer in layers:
        layer.forward = partial(_linear, multiply, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        trunk.config._attn_implementation = before
        for layer in layers:
            del layer.forward


def cached_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of transformers' interface, in which heads that share keys and values are rows of one product.

    transformers does the same for one token at a time and copies keys and values for each head where there are more.

    Args:
        module: the block's attention.
        query: (n, heads, T, width).
        key: (n, kv heads, L, width).
        value: as ``key``.
        attention_mask: (n, 1, T, L), true where a token sees another; without it the tokens see one another.
        scaling: of the products.
        options: of transformers' own attention, which does the latter.

    Returns:
        (n, T, heads, width), and no weights.
    """
    if attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, **options)
    count, heads, length, width = query.shape
    groups = heads // key.shape[1]
    packed = query.reshape(count, -1, groups * length, width)
    mask = attention_mask.repeat(1, 1, groups, 1)
    output = F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scaling)
    return output.reshape(count, heads, length, width).transpose(1, 2).contiguous(), None


def _linear(multiply: PackedProducts, layer: nn.Linear, x: Tensor) -> Tensor:
    return multiply(x, layer.weight, layer.bias)


_NAME = "cached"
AttentionInterface.register(_NAME, cached_attention)
