"""The slot embedding: equal places at all sizes, interpolated between the nodes of its grid."""

import pytest
import torch
import torch.nn.functional as F
from tiny_mllm import VOCABULARY
from torch import Tensor

from illume_lightning.image_layout import image_layout
from illume_lightning.nn.slot_embedding import SlotEmbedding
from illume_lightning.resolution import Size


def cells(embedding: SlotEmbedding, size: Size, branch: str) -> Tensor:
    """(h, w, width) of a picture's cells."""
    layout = image_layout(size, VOCABULARY)
    slots = torch.tensor([layout.slot_ids])[:, list(getattr(layout, f"{branch}_slots"))]
    return embedding(slots).view(*getattr(layout.grids, branch), -1)


@pytest.mark.parametrize("size", [(128, 128), (256, 256), (512, 256), (192, 320)])
def test_a_grid_is_interpolated_as_a_picture_is(size: Size) -> None:
    torch.manual_seed(0)
    embedding = SlotEmbedding(4, 3)
    torch.nn.init.uniform_(embedding.weight)
    grid = embedding.weight.detach().view(2, 4, 4, 3).permute(0, 3, 1, 2)
    for branch, nodes in zip(("semantic", "pixel"), grid, strict=True):
        found = cells(embedding, size, branch)
        shape = found.shape[:2]
        wanted = F.interpolate(nodes[None], shape, mode="bilinear")[0].permute(1, 2, 0)
        # Places are rounded to a 64th of a side, by half of one at most; a node is a 4th away.
        torch.testing.assert_close(found, wanted, atol=2 * 4 / 128, rtol=0)


def test_one_place_has_one_vector_at_all_sizes_and_each_branch_its_own() -> None:
    torch.manual_seed(0)
    embedding = SlotEmbedding(8, 5)
    torch.nn.init.normal_(embedding.weight)
    small, large = (cells(embedding, (side, side), "pixel") for side in (80, 240))
    torch.testing.assert_close(large[1::3, 1::3], small)  # every third of three times as many centres
    assert (cells(embedding, (80, 80), "semantic")[0, 0] - small[0, 0]).abs().max() > 0.1


def test_markers_stand_nowhere_but_ends_of_lines_at_the_right_edge() -> None:
    torch.manual_seed(0)
    embedding = SlotEmbedding(4, 3)
    torch.nn.init.normal_(embedding.weight)
    layout = image_layout((64, 64), VOCABULARY)
    vectors = embedding(torch.tensor([layout.slot_ids]))[0]
    is_cell = torch.zeros(layout.length, dtype=torch.bool)
    is_cell[[*layout.semantic_slots, *layout.pixel_slots]] = True
    is_end = torch.tensor([ids[0] == VOCABULARY.end_of_line for ids in layout.allowed])
    assert vectors[~is_cell & ~is_end].eq(0).all() and vectors[is_end].ne(0).all()
    assert not embedding(torch.zeros(2, 3, dtype=torch.long)).any()


def test_a_grid_of_one_node_is_refused() -> None:
    with pytest.raises(ValueError, match="slot_grid is 1"):
        SlotEmbedding(1, 8)
