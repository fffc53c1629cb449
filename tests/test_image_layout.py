import random
from dataclasses import replace

import pytest

from illume_lightning.image_layout import image_layout
from illume_lightning.resolution import grids
from illume_lightning.vocabulary import Vocabulary

# Tokens from start to end of image, by the official release's table.
LENGTHS = {
    (256, 256): 368,
    (512, 512): 1404,
    (512, 384): 1014,
    (384, 512): 1002,
    (768, 384): 1570,
    (384, 768): 1533,
    (1024, 256): 1454,
    (256, 1024): 1379,
    (384, 576): 1122,
    (576, 384): 1140,
    (960, 320): 1662,
    (320, 960): 1600,
}
SMALL = Vocabulary(num_text=50, semantic_codes=8, pixel_codes=16, size_step=16)
PIXEL_FIRST = replace(SMALL, pixel_first=True)


@pytest.mark.parametrize("size", LENGTHS)
def test_lengths_are_the_published_ones(size):
    assert image_layout(size, Vocabulary()).length == LENGTHS[size]


def test_a_small_image_in_full():
    layout = image_layout((32, 48), SMALL)
    assert layout.grids == grids(32, 48) == ((1, 1), (2, 3))
    soi, eoi, eol, s0, e0, s1, e1 = range(50, 57)
    first, second = SMALL.semantic_ids.start, SMALL.pixel_ids.start
    assert layout.ids([7], [0, 1, 2, 3, 4, 15]) == [
        *(soi, s0, first + 7, eol, e0),
        *(s1, second, second + 1, second + 2, eol, second + 3, second + 4, second + 15, eol, e1),
        eoi,
    ]
    assert image_layout((32, 48), PIXEL_FIRST).ids([7], [0, 1, 2, 3, 4, 15]) == [
        *(soi, s1, second, second + 1, second + 2, eol, second + 3, second + 4, second + 15, eol, e1),
        *(s0, first + 7, eol, e0),
        eoi,
    ]
    assert layout.size_tokens == (58, 75)
    assert [layout.template[slot] for slot in layout.pixel_slots] == [second] * 6


@pytest.mark.parametrize("vocabulary", [SMALL, PIXEL_FIRST], ids=["", "pixel first"])
@pytest.mark.parametrize("size", [(16, 16), (112, 112), (64, 208), (1024, 256)])
def test_ids_and_codes_are_inverse(size, vocabulary):
    draw = random.Random(0)
    layout = image_layout(size, vocabulary)
    semantic = [draw.randrange(8) for _ in layout.semantic_slots]
    pixel = [draw.randrange(16) for _ in layout.pixel_slots]
    ids = layout.ids(semantic, pixel)
    assert layout.codes(ids) == (semantic, pixel)
    assert all(token in allowed for token, allowed in zip(ids, layout.allowed, strict=True))


@pytest.mark.parametrize("size", [(16, 16), (64, 208)])
def test_the_order_moves_cells_and_changes_nothing_else(size):
    layout, other = image_layout(size, SMALL), image_layout(size, PIXEL_FIRST)
    assert max(layout.semantic_slots) < min(layout.pixel_slots)
    assert max(other.pixel_slots) < min(other.semantic_slots)
    for name in ("semantic_slots", "pixel_slots"):
        places = [[found.slot_ids[slot] for slot in getattr(found, name)] for found in (layout, other)]
        assert places[0] == places[1]
    assert sorted(zip(layout.template, layout.slot_ids, strict=True)) == sorted(
        zip(other.template, other.slot_ids, strict=True)
    )


def test_what_is_refused():
    layout = image_layout((32, 48), SMALL)
    with pytest.raises(ValueError, match="5 pixel codes for a picture of 32 x 48 .* 2 x 3 = 6"):
        layout.ids([0], [0] * 5)
    with pytest.raises(ValueError, match="semantic code 8 is none of the codebook's 8"):
        layout.ids([8], [0] * 6)
    ids = layout.ids([0], [0] * 6)
    with pytest.raises(ValueError, match="15 ids"):
        layout.codes(ids[:-1])
    ids[3] = 0
    with pytest.raises(ValueError, match="id 0 at position 3: only 52 may stand there"):
        layout.codes(ids)
    with pytest.raises(ValueError, match="multiples of 16"):
        image_layout((30, 48), SMALL)
