"""Qwen2.5 folders load, and the published layout round-trips."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_mllm import VOCABULARY, Document, build_mllm, pack
from transformers import Qwen2Config, Qwen2ForCausalLM

from illume_lightning.nn.hollow import WithoutWeights
from illume_lightning.nn.mllm import MLLM, build_trunk
from illume_lightning.nn.mllm_checkpoints import (
    load_mllm,
    load_qwen,
    published_layout,
    read_mllm,
    save_mllm,
    trunk_from,
)
from illume_lightning.nn.pixel import PixelEncoder
from illume_lightning.nn.published_vocabulary import vocabulary_from
from illume_lightning.nn.semantic import QwenVisionTower
from illume_lightning.vocabulary import Vocabulary

BASE_ROWS = 60


def save_qwen(
    folder: Path, rows: int = BASE_ROWS, tied: bool = False, shard: str = "5GB"
) -> Qwen2ForCausalLM:
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=rows,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    qwen = Qwen2ForCausalLM(config)
    qwen.save_pretrained(folder, max_shard_size=shard)
    return qwen.eval()


def logits(mllm: MLLM, ids: torch.Tensor) -> torch.Tensor:
    hidden = mllm.hidden(mllm.embedding(ids), torch.arange(ids.shape[1])[None])
    return mllm.head.logits(hidden)


def assert_equal(ours: MLLM, theirs: MLLM) -> None:
    state = theirs.state_dict()
    assert ours.state_dict().keys() == state.keys()
    for key, value in ours.state_dict().items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_qwen_gives_trunk_and_text_rows(tmp_path: Path, tied: bool, shard: str) -> None:
    qwen = save_qwen(tmp_path, tied=tied, shard=shard)
    assert (tmp_path / "model.safetensors.index.json").is_file() == (shard == "20KB")
    torch.manual_seed(2)
    mllm = build_mllm(tied=tied)
    before = mllm.embedding.vision.detach().clone()
    load_qwen(mllm, tmp_path)
    ids = torch.randint(50, (2, 12))
    theirs = qwen(ids).logits
    ours = logits(mllm, ids)
    torch.testing.assert_close(ours[..., :BASE_ROWS], theirs, rtol=1e-5, atol=1e-5)
    # Rows that Qwen's table has beyond its tokenizer are the first vision rows; the others stay.
    table = qwen.model.embed_tokens.weight
    assert torch.equal(mllm.embedding.vision[:10], table[50:])
    assert torch.equal(mllm.embedding.vision[10:], before[10:])


def test_trunk_from_a_folder(tmp_path: Path) -> None:
    qwen = save_qwen(tmp_path)
    trunk = trunk_from(tmp_path)
    shapes = {
        key: value.shape for key, value in qwen.model.state_dict().items() if key != "embed_tokens.weight"
    }
    assert {key: value.shape for key, value in trunk.state_dict().items()} == shapes
    assert trunk.config.rope_parameters["rope_theta"] == 1e6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "scaled RoPE"),
        ({"use_sliding_window": True}, "sliding windows"),
        ({"num_key_value_heads": None}, "no num_key_value_heads"),
    ],
)
def test_configs_that_the_trunk_cannot_be(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    save_qwen(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        trunk_from(tmp_path)


def test_rope_base_of_older_configs(tmp_path: Path) -> None:
    save_qwen(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"]
    path.write_text(json.dumps(config | {"rope_theta": 500.0}))
    assert trunk_from(tmp_path).config.rope_parameters["rope_theta"] == 500


def test_what_does_not_fit_qwen_is_named(tmp_path: Path) -> None:
    save_qwen(tmp_path / "base")
    with pytest.raises(ValueError, match=r"width 32 in the folder, 64 in the model.*trunk_from"):
        load_qwen(build_mllm(width=64), tmp_path / "base")
    with pytest.raises(ValueError, match=r"num_kv_heads 2 in the folder, 4 in the model"):
        load_qwen(build_mllm(num_kv_heads=4), tmp_path / "base")
    with pytest.raises(ValueError, match=r"rope_base 1000000.0 in the folder, 10000.0 in the model"):
        load_qwen(build_mllm(rope_base=1e4), tmp_path / "base")
    with pytest.raises(ValueError, match=r"a head of its own.*tied=False"):
        load_qwen(build_mllm(tied=True), tmp_path / "base")
    save_qwen(tmp_path / "tied", tied=True)
    with pytest.raises(ValueError, match=r"its head is tied.*tied=True"):
        load_qwen(build_mllm(), tmp_path / "tied")
    save_qwen(tmp_path / "small", rows=40)
    with pytest.raises(ValueError, match=r"has 40 rows, the vocabulary 50 text tokens"):
        load_qwen(build_mllm(), tmp_path / "small")
    with pytest.raises(FileNotFoundError, match=r"no .*config\.json"):
        load_qwen(build_mllm(), tmp_path / "nowhere")


def test_a_refused_checkpoint_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    save_qwen(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    torch.manual_seed(2)
    mllm = build_mllm()
    with pytest.raises(ValueError, match=r"1 missing in the file, first: model\.norm\.weight"):
        load_qwen(mllm, tmp_path)
    torch.manual_seed(2)
    assert_equal(mllm, build_mllm())


@pytest.mark.parametrize("shard_bytes", [10**9, 30_000])
@pytest.mark.parametrize(("tied", "slot_grid"), [(False, 0), (True, 4)])
def test_round_trip(tmp_path: Path, tied: bool, slot_grid: int, shard_bytes: int) -> None:
    torch.manual_seed(0)
    saved = build_mllm(tied, slot_grid)
    if slot_grid:
        torch.nn.init.normal_(saved.slot_embedding.weight)
    save_mllm(saved, tmp_path / "out", shard_bytes)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert (len(shards) > 1) == (shard_bytes < 10**9)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    other = build_mllm(tied, slot_grid)
    assert load_mllm(other, tmp_path / "out") == []
    assert_equal(other, saved)
    sizes = trunk_from(tmp_path / "out").config
    assert (sizes.hidden_size, sizes.num_key_value_heads) == (32, 2)


def test_published_keys_and_rows(tmp_path: Path) -> None:
    mllm = build_mllm()
    save_mllm(mllm, tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    table = weights["model.embed_tokens.weight"]
    assert table.shape == weights["lm_head.weight"].shape == (VOCABULARY.size, 32)
    assert torch.equal(table[:50], mllm.embedding.text)
    assert torch.equal(table[50:], mllm.embedding.vision)
    for key in (
        "model.layers.1.self_attn.q_proj.bias",
        "model.norm.weight",
        "model.mm_projector.projector_1.0.weight",
        "model.mm_projector.projector_2.2.bias",
        "model.vision_tower.semantic_encoder.blocks.0.attn.qkv.weight",
        "model.vision_tower.semantic_encoder.merger.mlp.0.weight",
        "model.vision_tower.pixel_encoder.conv_in.weight",
    ):
        assert key in weights
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (VOCABULARY.size, False)
    save_mllm(build_mllm(tied=True), tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")


def test_absent_towers_stay_and_are_told(tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved = build_mllm()
    save_mllm(saved, tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    without = {key: value for key, value in weights.items() if "vision_tower" not in key}
    save_file(without, tmp_path / "weights.safetensors")
    other = build_mllm(slot_grid=3)
    tower = other.semantic_encoder.blocks[0].attn.qkv.weight.detach().clone()
    assert load_mllm(other, tmp_path / "weights.safetensors") == [
        "model.vision_tower.semantic_encoder.",
        "model.vision_tower.pixel_encoder.",
        "model.slot_embedding.",
    ]
    assert torch.equal(other.semantic_encoder.blocks[0].attn.qkv.weight, tower)
    assert torch.equal(other.head.vision, saved.head.vision)
    one = {key: value for key, value in weights.items() if "pixel_encoder.conv_in" not in key}
    save_file(one, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match=r"2 missing in the file, first: model\.vision_tower\.pixel_encoder"):
        load_mllm(build_mllm(), tmp_path / "part.safetensors")


def test_what_does_not_fit_the_layout_is_named(tmp_path: Path) -> None:
    save_mllm(build_mllm(), tmp_path / "out")
    with pytest.raises(ValueError, match=r"width 32 in the folder, 64 in the model"):
        load_mllm(build_mllm(width=64), tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"of another shape, first: lm_head\.weight: \(238, 32\) in the file"
    ):
        load_mllm(build_mllm(width=64), tmp_path / "out" / "model.safetensors")
    with pytest.raises(ValueError, match="exists: choose another folder"):
        save_mllm(build_mllm(), tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        load_mllm(build_mllm(), tmp_path / "out")


@pytest.mark.parametrize(
    "options", [{"discrete_input": True}, {"vocabulary": replace(VOCABULARY, pixel_first=True)}]
)
def test_ablations_have_no_published_layout(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="discrete_input or pixel_first can't be written"):
        save_mllm(build_mllm(**options), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_bf16_weights_fill_an_fp32_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved = build_mllm().bfloat16()
    save_mllm(saved, tmp_path / "out")
    other = build_mllm()
    load_mllm(other, tmp_path / "out")
    assert_equal(other, saved.float())
    assert other(**pack([[Document(1, (32, 32))]], length=40)).loss.isfinite()


def save_published(mllm: MLLM, folder: Path, leave_out: tuple[str, ...] = ()) -> Path:
    """With the added tokens of a tokenizer, and without some weights."""
    save_mllm(mllm, folder)
    tokens = [{"id": 0, "content": "<|im_end|>"}]
    tokens += [
        {"id": id, "content": text} for id, text in enumerate(VOCABULARY.tokens(), VOCABULARY.num_text)
    ]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    if leave_out:
        weights = load_file(folder / "model.safetensors")
        kept = {key: value for key, value in weights.items() if not key.startswith(leave_out)}
        save_file(kept, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(("tied", "slot_grid", "adapter_rms"), [(False, 0, 0.0), (True, 4, 0.05)])
def test_a_model_is_built_from_its_folder(
    tmp_path: Path, tied: bool, slot_grid: int, adapter_rms: float
) -> None:
    torch.manual_seed(0)
    saved = build_mllm(tied, slot_grid, adapter_rms=adapter_rms)
    folder = save_published(saved, tmp_path / "out")
    towers = build_mllm()
    before = {key: value.clone() for key, value in towers.state_dict().items()}
    read = read_mllm(folder, towers.semantic_encoder, towers.pixel_encoder)
    assert read.vocabulary == VOCABULARY and VOCABULARY.num_unused == 5
    assert read.head.is_tied == tied
    assert_equal(read, saved)
    assert all(torch.equal(value, before[key]) for key, value in towers.state_dict().items())
    batch = pack([[Document(1, (32, 32))]], length=40)
    places = {"slot_ids": torch.zeros_like(batch["ids"])} if slot_grid else {}
    assert torch.equal(read(**batch, **places).loss, saved(**batch, **places).loss)
    # Weights are the model's own, not the file's pages.
    (folder / "model.safetensors").write_bytes(b"")
    assert_equal(read, saved)


def test_a_built_model_has_the_wanted_type_and_exact_angles(tmp_path: Path) -> None:
    saved = build_mllm()
    folder = save_published(saved, tmp_path / "out")
    read = read_mllm(folder, saved.semantic_encoder, saved.pixel_encoder, dtype=torch.bfloat16)
    assert {value.dtype for value in read.parameters()} == {torch.bfloat16}
    assert {value.dtype for value in read.buffers()} == {torch.float32}
    assert_equal(read, build_copy(saved))


def build_copy(mllm: MLLM) -> MLLM:
    other = build_mllm()
    other.load_state_dict(mllm.state_dict())
    return other.bfloat16()


def test_towers_that_a_folder_leaves_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved = build_mllm()
    folder = save_published(saved, tmp_path / "out", ("model.vision_tower.semantic_encoder",))
    other = build_mllm()
    read = read_mllm(folder, other.semantic_encoder, other.pixel_encoder)
    for name, source in (("semantic_encoder", other), ("pixel_encoder", saved), ("head", saved)):
        state = getattr(source, name).state_dict()
        assert all(torch.equal(value, state[key]) for key, value in getattr(read, name).state_dict().items())
    with pytest.raises(
        ValueError, match=r"no weights of model\.vision_tower\.semantic_encoder: give the DualViTok"
    ):
        read_mllm(folder)
    small = PixelEncoder(8, num_res_blocks=1, latent_channels=16, norm_groups=4)
    with pytest.raises(ValueError, match="of another shape, first: model.mm_projector.projector_2.0.weight"):
        read_mllm(folder, other.semantic_encoder, small)


def test_folders_of_another_layout_are_named(tmp_path: Path) -> None:
    mllm = build_mllm()
    folder = save_published(mllm, tmp_path / "out")
    towers = mllm.semantic_encoder, mllm.pixel_encoder
    path = folder / "tokenizer.json"
    tokens = json.loads(path.read_text())["added_tokens"]
    with pytest.raises(ValueError, match="has 233 tokens, the embedding 200 rows"):
        vocabulary_from(folder, 200)
    swapped = [{**token, "id": {53: 54, 54: 53}.get(token["id"], token["id"])} for token in tokens]
    path.write_text(json.dumps({"added_tokens": swapped}))
    with pytest.raises(ValueError, match="<start_of_level0> at 54, its published place is 53"):
        read_mllm(folder, *towers)
    path.write_text(json.dumps({"added_tokens": tokens[:1]}))
    with pytest.raises(ValueError, match="has no vision tokens"):
        read_mllm(folder, *towers)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no .*tokenizer\.json"):
        read_mllm(folder, *towers)
    save_file({"language_model.x": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="not in the official release's origin format.*without '-hf'"):
        read_mllm(folder, *towers)


def test_the_full_size_model_is_built_without_its_weights() -> None:
    with WithoutWeights():
        mllm = MLLM(build_trunk(), Vocabulary(num_unused=271), QwenVisionTower(), PixelEncoder(), tied=True)
    real = sum(value.numel() for value in mllm.parameters() if not value.is_meta)
    assert real == 73 * 2048
    assert published_layout(mllm)["model.embed_tokens.weight"][1].shape == (131_382, 2048)
    assert torch.equal(mllm.trunk.rotary_emb.inv_freq, build_trunk(depth=1).rotary_emb.inv_freq)
