"""Text and vision rows are separate parameters behind one table."""

import copy

import pytest
import torch
import torch.nn.functional as F

from illume_lightning.nn.segmented import SegmentedEmbedding, SegmentedHead


def test_lookup_equals_one_table() -> None:
    embedding = SegmentedEmbedding(7, 5, 3)
    ids = torch.tensor([[0, 6, 7], [11, 3, 8]])
    table = torch.cat(embedding.tables).detach().requires_grad_()
    out, expected = embedding(ids), F.embedding(ids, table)
    assert torch.equal(out, expected)
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(torch.cat([embedding.text.grad, embedding.vision.grad]), table.grad)


@pytest.mark.parametrize("wrong", [12, -1])
def test_an_id_outside_is_an_error(wrong: int) -> None:
    with pytest.raises(IndexError):
        SegmentedEmbedding(7, 5, 3)(torch.tensor([wrong]))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ids", [range(3), range(5, 9), range(7, 12), range(8, 10), range(12), None])
def test_a_range_of_logits_equals_the_slice(tied: bool, ids: range | None) -> None:
    head = SegmentedHead(SegmentedEmbedding(7, 5, 3), tied)
    hidden = torch.randn(2, 4, 3)
    expected = hidden @ torch.cat(head.tables).T
    wanted = expected if ids is None else expected[..., ids.start : ids.stop]
    torch.testing.assert_close(head.logits(hidden, ids), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("ids", [range(0), range(0, 6, 2), range(5, 13), range(-1, 3)])
def test_a_range_that_is_none_is_named(ids: range) -> None:
    with pytest.raises(ValueError, match="within 0 to 11"):
        SegmentedHead(SegmentedEmbedding(7, 5, 3)).logits(torch.zeros(1, 3), ids)


def test_a_tied_head_has_no_parameters_and_follows_its_embedding() -> None:
    embedding = SegmentedEmbedding(7, 5, 3)
    pair = torch.nn.ModuleList([embedding, SegmentedHead(embedding, tied=True)])
    assert list(pair.state_dict()) == ["0.text", "0.vision"]
    assert pair[1].is_tied and pair[1].tables[0] is embedding.text
    copied = copy.deepcopy(pair)
    assert copied[1].tables[0] is copied[0].text
    untied = SegmentedHead(embedding)
    assert [tuple(value.shape) for value in untied.state_dict().values()] == [(7, 3), (5, 3)]
    assert not untied.is_tied and untied.text is not embedding.text
