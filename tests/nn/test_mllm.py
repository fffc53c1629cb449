"""The MLLM: packing, padding, freezing, picture features, and what is part of the graph."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_mllm import VOCABULARY, Document, build_mllm, pack
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available

from illume_lightning.nn import document_attention
from illume_lightning.nn import mllm as mllm_module
from illume_lightning.nn.document_attention import document_bounds
from illume_lightning.nn.mllm import MLLM, build_trunk
from illume_lightning.resolution import grids

DOCUMENTS = [Document(1, (32, 48)), Document(2), Document(3, (64, 64), 12), Document(4)]


@pytest.fixture
def mllm() -> MLLM:
    torch.manual_seed(0)
    return build_mllm()


def step(mllm: MLLM, batch: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, token losses, and the gradients by name."""
    mllm.zero_grad()
    output = mllm(**batch)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in mllm.named_parameters() if p.grad is not None}
    return output.loss.detach(), output.token_losses, gradients


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-6, msg=name)


def test_packed_equals_one_document_per_row(mllm: MLLM) -> None:
    packed = step(mllm, pack([DOCUMENTS], length=120))
    rows = step(mllm, pack([[document] for document in DOCUMENTS], length=70))
    torch.testing.assert_close(packed[0], rows[0])
    torch.testing.assert_close(packed[1], rows[1], rtol=1e-5, atol=1e-5)
    assert_same(packed[2], rows[2])


def test_a_document_alone_has_the_same_losses(mllm: MLLM) -> None:
    packed = mllm(**pack([DOCUMENTS], length=120)).token_losses
    for number, document in enumerate(DOCUMENTS):
        batch = pack([[document]], length=70)
        length = int((batch["document_ids"] >= 0).sum())
        batch = {
            name: value[:, :length] if name in ("ids", "position_ids") else value
            for name, value in batch.items()
        }
        alone = mllm(**(batch | {"document_ids": None})).token_losses
        torch.testing.assert_close(alone, packed[4 * number : 4 * number + 4], rtol=1e-5, atol=1e-5)


def test_a_token_sees_only_what_stands_before_it_in_its_document(mllm: MLLM) -> None:
    documents = torch.tensor([[1, 1, 1, 2, 2, 2, -1, -1]])
    embeds = torch.randn(1, 8, 32, requires_grad=True)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 0, 0]])
    hidden = mllm.hidden(embeds, positions, documents)
    (gradient,) = torch.autograd.grad(hidden[0, 4].sum(), embeds)
    assert gradient[0].abs().sum(-1).ne(0).tolist() == [False, False, False, True, True, False, False, False]


def test_padding_is_finite_and_changes_nothing(mllm: MLLM) -> None:
    tight, loose = (pack([DOCUMENTS[:2]], length) for length in (32, 64))
    assert (tight["document_ids"] >= 0).all()
    for batch in (tight, loose):
        batch["inputs_embeds"] = mllm.embed(
            *(batch[name] for name in ("ids", "images", "semantic_slots", "pixel_slots"))
        )
        names = ("inputs_embeds", "position_ids", "document_ids")
        batch["hidden"] = mllm.hidden(*(batch[name] for name in names))
    torch.testing.assert_close(tight["hidden"], loose["hidden"][:, :32], rtol=1e-5, atol=1e-5)
    assert loose["hidden"].isfinite().all()


def test_features_stand_row_by_row_picture_by_picture(mllm: MLLM) -> None:
    wide, square = torch.rand(2, 3, 32, 64) * 2 - 1, torch.rand(1, 3, 64, 64) * 2 - 1
    semantic, pixel = mllm.features([wide, square])
    maps = [mllm.semantic_encoder.features(batch) for batch in (wide, square)]
    expected = torch.cat([grid.permute(0, 2, 3, 1).reshape(-1, 48) for grid in maps])
    torch.testing.assert_close(semantic, expected, rtol=1e-5, atol=1e-5)
    rows, columns = grids(32, 64).pixel
    one = mllm.pixel_encoder(wide)[1, :, 1, 2]
    torch.testing.assert_close(pixel[rows * columns + columns + 2], one, rtol=1e-5, atol=1e-5)
    assert len(pixel) == 2 * rows * columns + 16


def test_features_take_the_place_of_tokens(mllm: MLLM) -> None:
    batch = pack([DOCUMENTS[:1], DOCUMENTS[2:3]], length=60)
    embeds = mllm.embed(batch["ids"], batch["images"], batch["semantic_slots"], batch["pixel_slots"])
    semantic, pixel = mllm.features(batch["images"])
    flat = embeds.flatten(0, 1)
    torch.testing.assert_close(flat[batch["semantic_slots"]], mllm.semantic_adapter(semantic))
    torch.testing.assert_close(flat[batch["pixel_slots"]], mllm.pixel_adapter(pixel))
    others = torch.ones(120, dtype=torch.bool)
    others[torch.cat([batch["semantic_slots"], batch["pixel_slots"]])] = False
    assert torch.equal(flat[others], mllm.embedding(batch["ids"]).flatten(0, 1)[others])


def test_frozen_towers_build_no_graph(mllm: MLLM) -> None:
    images = [torch.rand(1, 3, 32, 32)]
    assert all(value.requires_grad for value in mllm.features(images))
    mllm.semantic_encoder.requires_grad_(False)
    mllm.pixel_encoder.requires_grad_(False)
    assert not any(value.requires_grad for value in mllm.features(images))
    with torch.no_grad():
        mllm.pixel_encoder.requires_grad_(True)
        assert not any(value.requires_grad for value in mllm.features(images))
    mllm.pixel_encoder.requires_grad_(False)
    _, _, gradients = step(mllm, pack([DOCUMENTS], length=120))
    assert not any("encoder" in name for name in gradients)
    assert gradients["semantic_adapter.0.weight"].abs().sum() > 0


def test_discrete_input_is_tokens_and_trains_no_more_than_takes_part() -> None:
    torch.manual_seed(0)
    mllm = build_mllm(slot_grid=4, discrete_input=True)
    batch = pack([DOCUMENTS], length=120) | {"slot_ids": torch.arange(120)[None] % 7}
    with pytest.raises(ValueError, match="has discrete input: put the pictures' codes into ids, not images"):
        mllm(**batch)
    batch["images"] = []
    loss, _, gradients = step(mllm, batch)
    idle = ("semantic_", "pixel_")
    assert gradients.keys() == {name for name, _ in mllm.named_parameters() if not name.startswith(idle)}
    assert [id(p) for p in mllm.adapter_parameters()] == [id(mllm.slot_embedding.weight)]
    batch["ids"][0, batch["pixel_slots"][3]] += 1
    assert step(mllm, batch)[0] != loss


@pytest.mark.parametrize("slot_grid", [0, 4])
def test_without_pictures_every_parameter_still_has_a_gradient(slot_grid: int) -> None:
    torch.manual_seed(0)
    mllm = build_mllm(slot_grid=slot_grid)
    batch = pack([[Document(2), Document(4)]], length=20)
    assert not batch["images"]
    if slot_grid:
        batch["slot_ids"] = torch.zeros_like(batch["ids"])
    _, _, gradients = step(mllm, batch)
    assert gradients.keys() == {name for name, _ in mllm.named_parameters()}
    idle = ("semantic_", "pixel_", "slot_")
    for name, gradient in gradients.items():
        assert bool(gradient.any()) != name.startswith(idle), name


def test_text_rows_freeze_alone(mllm: MLLM) -> None:
    for part in (mllm.trunk, mllm.embedding.text, mllm.head.text):
        part.requires_grad_(False)
    _, _, gradients = step(mllm, pack([DOCUMENTS], length=120))
    tables = {name: value for name, value in gradients.items() if name.startswith(("embedding", "head"))}
    assert tables.keys() == {"embedding.vision", "head.vision"}
    assert all(value.abs().sum() > 0 for value in tables.values())


def test_a_tied_head_trains_the_embedding() -> None:
    torch.manual_seed(0)
    mllm = build_mllm(tied=True)
    assert not list(mllm.head.parameters())
    tables = [tuple(value.shape) for name, value in mllm.named_parameters() if name.startswith("embedding")]
    assert tables == [(50, 32), (VOCABULARY.size - 50, 32)]
    _, _, gradients = step(mllm, pack([DOCUMENTS], length=120))
    absent = torch.ones(50, dtype=torch.bool)
    ids = pack([DOCUMENTS], length=120)["ids"]
    absent[ids[ids < 50]] = False
    # A row that never was input has a gradient through the head alone.
    assert gradients["embedding.text"][absent].abs().sum() > 0


def test_activation_checkpointing_changes_nothing(mllm: MLLM) -> None:
    batch = pack([DOCUMENTS], length=120)
    plain = step(mllm, batch)
    calls = []
    mllm.trunk.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    mllm.checkpoint_activations()
    checkpointed = step(mllm.train(), batch)
    assert len(calls) == 2
    torch.testing.assert_close(plain[0], checkpointed[0])
    assert_same(plain[2], checkpointed[2])


def test_slot_embedding_starts_as_nothing_and_learns_the_slots_that_occur() -> None:
    torch.manual_seed(0)
    mllm = build_mllm(slot_grid=4)
    batch = pack([DOCUMENTS], length=120)
    slot_ids = torch.zeros_like(batch["ids"])
    slot_ids[:, :10] = 1 + torch.arange(10)  # the semantic grid's top left corner
    inputs = [batch[name] for name in ("ids", "images", "semantic_slots", "pixel_slots")]
    assert torch.equal(mllm.embed(*inputs, slot_ids), mllm.embed(*inputs, torch.zeros_like(slot_ids)))
    _, _, gradients = step(mllm, batch | {"slot_ids": slot_ids})
    learned = gradients["slot_embedding.weight"].abs().sum(1).ne(0)
    assert learned.nonzero().flatten().tolist() == [0, 1]
    with pytest.raises(ValueError, match="give slot_ids"):
        mllm(**batch)
    plain = build_mllm()
    assert plain(**batch, slot_ids=slot_ids).loss == plain(**batch).loss


def test_features_enter_as_large_as_words() -> None:
    torch.manual_seed(0)
    mllm = build_mllm(adapter_rms=0.05, slot_grid=8)
    torch.testing.assert_close(mllm.slot_embedding.weight.std(), torch.tensor(0.05), rtol=0.1, atol=0)
    mllm.slot_embedding = None
    with torch.no_grad():
        mllm.pixel_adapter[2].weight.mul_(1000)
    batch = pack([DOCUMENTS], length=120)
    slots = torch.cat([batch["semantic_slots"], batch["pixel_slots"]])
    embeds = mllm.embed(*(batch[name] for name in ("ids", "images", "semantic_slots", "pixel_slots")))
    features = embeds.flatten(0, 1)[slots]
    torch.testing.assert_close(features.square().mean(1).sqrt(), torch.full((len(slots),), 0.05))
    _, _, gradients = step(mllm, batch)
    for name in ("semantic", "pixel"):
        assert gradients[f"{name}_adapter.3.weight"].abs().sum() > 0
    assert {id(parameter) for parameter in mllm.pixel_adapter.parameters()} < set(
        map(id, mllm.adapter_parameters())
    )


def test_weights_of_tokens_count(mllm: MLLM) -> None:
    batch = pack([DOCUMENTS], length=120)
    weights = torch.zeros(len(batch["targets"]))
    weights[3] = 0.5
    output = mllm(**batch, weights=weights)
    torch.testing.assert_close(output.loss, 0.5 * output.token_losses[3])


def test_bf16_autocast_is_finite(mllm: MLLM) -> None:
    batch = pack([DOCUMENTS], length=120)
    exact = mllm(**batch).loss
    with torch.autocast("cpu", torch.bfloat16):
        output = mllm(**batch)
    torch.testing.assert_close(output.loss, exact, rtol=0.05, atol=0)
    output.loss.backward()
    assert all(value.grad.isfinite().all() for value in mllm.parameters())


def test_bf16_weights_take_fp32_pictures(mllm: MLLM) -> None:
    output = mllm.bfloat16()(**pack([DOCUMENTS], length=120))
    assert output.loss.isfinite()


def test_bounds_of_documents() -> None:
    bounds = document_bounds(torch.tensor([[4, 4, 5, -1], [6, 6, 6, 6]]))
    assert bounds["cu_seq_lens_q"].tolist() == [0, 2, 3, 4, 8]
    assert bounds["cu_seq_lens_k"].dtype == torch.int32
    assert bounds["max_length_k"] == 4


def test_flash_attention_is_told_where_documents_start(mllm: MLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def variable_length(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, **arguments: Any
    ) -> tuple[Tensor, None]:
        """What the kernel computes, one document after the other."""
        assert mask is None
        bounds = arguments["cu_seq_lens_q"].tolist()
        heads = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
        parts = []
        for start, stop in itertools.pairwise(bounds):
            q, k, v = (x[start:stop].transpose(0, 1)[None] for x in heads)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            parts.append(out[0].transpose(0, 1))
        return torch.cat(parts).view(query.shape[0], query.shape[2], *parts[0].shape[1:]), None

    batch = pack([DOCUMENTS[:2], DOCUMENTS[2:]], length=60)
    expected = mllm(**batch)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", variable_length)
    mllm.trunk.config._attn_implementation = "flash_attention_2"
    torch.testing.assert_close(mllm(**batch).token_losses, expected.token_losses, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("short", [512, 5])
def test_attention_document_by_document_is_the_masked_one(
    mllm: MLLM, short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = pack([DOCUMENTS[:2], DOCUMENTS[2:]], length=60)
    expected = step(mllm, batch)
    monkeypatch.setattr(document_attention, "_SHORT", short)
    mllm.trunk.config._attn_implementation = document_attention.DOCUMENTS
    monkeypatch.setattr(mllm_module, "document_mask", None)  # it is not made
    found = step(mllm, batch)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-5)
    assert_same(found[2], expected[2])


def test_too_few_slots_are_named(mllm: MLLM) -> None:
    batch = pack([DOCUMENTS], length=120)
    batch["pixel_slots"] = batch["pixel_slots"][1:]
    with pytest.raises(ValueError, match="the pictures have 22 pixel cells, pixel_slots names 21 places"):
        mllm(**batch)


def test_trunks_that_cannot_be_are_named() -> None:
    with pytest.raises(ValueError, match="width 30, num_heads 4"):
        build_trunk(30, 1, 4, 2, 8)
    if not is_flash_attn_2_available():
        with pytest.raises(ValueError, match="needs the package flash-attn"):
            build_trunk(32, 1, 4, 2, 8, attention="flash_attention_2")
        assert build_trunk(32, 1, 4, 2, 8, attention="auto").config._attn_implementation == "sdpa"


def test_default_trunk_is_that_of_qwen_3b() -> None:
    with torch.device("meta"):
        trunk = build_trunk()
    # Qwen2.5-3B has 3,085,938,688 parameters, of which its tied table of 151,936 rows has 311,164,928.
    assert sum(value.numel() for value in trunk.parameters()) == 3_085_938_688 - 311_164_928
