"""Kernels of decoding give what transformers' own give."""

import pytest
import torch
import torch.nn.functional as F
from tiny_mllm import build_mllm
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from illume_lightning.nn.decoding import cached_attention, decoding
from illume_lightning.nn.matmul import PackedProducts


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_packed_heads_equal_copied_keys(length: int, kv_heads: int) -> None:
    torch.manual_seed(0)
    attention = build_mllm(num_heads=4, num_kv_heads=kv_heads).trunk.layers[0].self_attn
    query = torch.randn(3, 4, length, 8)
    key, value = torch.randn(2, 3, kv_heads, 11, 8)
    mask = torch.arange(11) <= torch.tensor([[4], [7], [9]])[:, None] + torch.arange(length)[:, None]
    arguments = (attention, query, key, value, mask[:, None])
    ours, _ = cached_attention(*arguments, scaling=0.3)
    theirs, _ = sdpa_attention_forward(*arguments, scaling=0.3)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_layers_give_what_they_did_and_are_left_as_they_were(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    trunk = build_mllm().trunk.to(dtype)
    layers = [layer for layer in trunk.modules() if isinstance(layer, torch.nn.Linear)]
    inputs = [torch.randn(2, 3, layer.in_features, dtype=dtype) for layer in layers]
    before = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
    with decoding(trunk, PackedProducts()):
        during = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
    torch.testing.assert_close(during, before)
    assert trunk.config._attn_implementation == "sdpa"
    assert not any("forward" in vars(layer) for layer in layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_packed_weights_follow_their_changes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    multiply = PackedProducts()
    table, bias = torch.randn(40, 24, dtype=dtype), torch.randn(40, dtype=dtype)
    x = torch.randn(2, 3, 24, dtype=dtype)
    for change in (lambda: None, lambda: table.mul_(2), lambda: table[12].add_(1)):
        change()
        for rows in (table, table[10:30], table[11:30], table.clone()):
            torch.testing.assert_close(multiply(x, rows), F.linear(x, rows))
        torch.testing.assert_close(multiply(x, table, bias), F.linear(x, table, bias))
    assert torch.equal(PackedProducts(is_on=False)(x, table), F.linear(x, table))
    with torch.autocast("cpu", torch.bfloat16):
        assert multiply(x, table).dtype == torch.bfloat16
