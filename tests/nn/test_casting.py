"""What stays in fp32 in a model whose weights become bfloat16."""

import copy

import torch
from diffusers import AutoencoderKL
from tiny import build_tiny
from tiny_mllm import build_mllm
from torch import nn

from illume_lightning.nn.draws import SampleDraws, normal, uniform
from illume_lightning.nn.latents import VAELatents


def test_angles_of_rotary_embeddings_stay_exact() -> None:
    mllm = build_mllm(max_positions=8192, slot_grid=4)
    positions = torch.tensor([[0, 1, 8000]])
    exact = mllm.trunk.rotary_emb(torch.zeros(1), positions)[0]
    for model in (mllm, copy.deepcopy(mllm)):
        model.to(torch.bfloat16)
        assert model.trunk.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
        torch.testing.assert_close(model.trunk.rotary_emb(torch.zeros(1), positions)[0], exact)
        assert model.slot_embedding.shares.dtype == torch.float32
    tower = build_tiny().to(torch.bfloat16).semantic_encoder.model
    for network in (mllm.semantic_encoder, tower):
        assert network.rotary_pos_emb.inv_freq.dtype == torch.float32
    assert mllm.to(torch.float64).trunk.rotary_emb.inv_freq.dtype == torch.float32
    assert mllm.to("meta").trunk.rotary_emb.inv_freq.is_meta


def test_the_vae_stays_as_it_is() -> None:
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2)
    latents = VAELatents(vae=vae)
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    expected = latents.encode(images)
    model = nn.ModuleDict({"latents": latents, "other": nn.Linear(2, 2)}).to(torch.bfloat16)
    assert model["other"].weight.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in latents.state_dict().values()} == {torch.float32}
    assert torch.equal(latents.encode(images), expected)
    assert next(latents.to("meta").parameters()).is_meta


def test_random_numbers_are_those_of_fp32() -> None:
    expected = [draw((2, 3), SampleDraws(1, [4, 5]), torch.device("cpu")) for draw in (uniform, normal)]
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = [draw((2, 3), SampleDraws(1, [4, 5]), torch.device("cpu")) for draw in (uniform, normal)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, found, expected))
