import pytest
from hypothesis import given
from hypothesis import strategies as st

from illume_lightning.resolution import (
    MAX_CROP,
    RATIO_ANCHORS,
    any_resolution,
    cropped_fraction,
    grids,
    nearest_ratio,
    ratio_sizes,
    semantic_input_size,
)

# height, width | scaled height, width | semantic rows, columns | pixel rows, columns | tokens of the picture
RELEASED = [
    (256, 256, 252, 252, 9, 9, 16, 16, 368),
    (512, 512, 504, 504, 18, 18, 32, 32, 1404),
    (512, 384, 448, 336, 16, 12, 32, 24, 1014),
    (384, 512, 336, 448, 12, 16, 24, 32, 1002),
    (768, 384, 728, 364, 26, 13, 48, 24, 1570),
    (384, 768, 364, 728, 13, 26, 24, 48, 1533),
    (1024, 256, 1008, 252, 36, 9, 64, 16, 1454),
    (256, 1024, 252, 1008, 9, 36, 16, 64, 1379),
    (384, 576, 336, 504, 12, 18, 24, 36, 1122),
    (576, 384, 504, 336, 18, 12, 36, 24, 1140),
    (960, 320, 924, 308, 33, 11, 60, 20, 1662),
    (320, 960, 308, 924, 11, 33, 20, 60, 1600),
]
sides = st.integers(1, 4000)
multiples = st.integers(1, 128).map(lambda n: 16 * n)


@pytest.mark.parametrize("row", RELEASED, ids=lambda row: f"{row[0]}x{row[1]}")
def test_released_sizes(row):
    height, width, scaled_h, scaled_w, h1, w1, h2, w2, length = row
    assert semantic_input_size(height, width) == (scaled_h, scaled_w)
    semantic, pixel = grids(height, width)
    assert (semantic, pixel) == ((h1, w1), (h2, w2))
    # Rows with an end-of-line each, and six markers around the two grids.
    assert semantic[0] * (semantic[1] + 1) + pixel[0] * (pixel[1] + 1) + 6 == length


def test_released_aspect_ratios_survive_exactly():
    for height, width, scaled_h, scaled_w, *_ in RELEASED:
        assert height * scaled_w == width * scaled_h


@given(multiples, multiples)
def test_other_sizes_round_down_to_28(height, width):
    if (height, width) in {row[:2] for row in RELEASED}:
        return
    assert semantic_input_size(height, width) == (max(28, height // 28 * 28), max(28, width // 28 * 28))
    semantic, pixel = grids(height, width)
    assert semantic == (max(1, height // 28), max(1, width // 28))
    assert pixel == (height // 16, width // 16)


@pytest.mark.parametrize(
    ("size", "nearest"),
    [((250, 256), "256 x 256"), ((256, 7), "256 x 16"), ((0, 64), "16 x 64"), ((-16, 40), "16 x 32")],
)
def test_sizes_without_a_pixel_grid_are_refused(size, nearest):
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]}.*nearest such size is {nearest}"):
        grids(*size)


def test_ratio_sizes_of_the_release():
    assert ratio_sizes(512) == RATIO_ANCHORS
    # The release's base sizes of the diffusion decoder's second stage.
    assert set(ratio_sizes(1024)) == {
        (1024, 1024), (768, 1024), (1024, 768), (512, 2048), (2048, 512), (640, 1920), (1920, 640),
        (768, 1536), (1536, 768), (768, 1152), (1152, 768),
    }  # fmt: skip
    with pytest.raises(ValueError, match="side 8"):
        ratio_sizes(8)


@given(st.integers(16, 2048))
def test_ratio_sizes_at_any_area(side):
    sizes = ratio_sizes(side)
    assert len(sizes) == 11
    for (height, width), (anchor_h, anchor_w) in zip(sizes, RATIO_ANCHORS, strict=True):
        assert grids(height, width).pixel == (height // 16, width // 16)
        assert abs(height - anchor_h * side / 512) <= 8 or height == 16
        assert abs(width - anchor_w * side / 512) <= 8 or width == 16


def test_nearest_ratio():
    sizes = ratio_sizes(512)
    assert nearest_ratio(1000, 1000, sizes) == ((512, 512), 0.0)
    assert nearest_ratio(300, 400, sizes) == ((384, 512), 0.0)
    assert nearest_ratio(100, 500, sizes).size == (256, 1024)
    match = nearest_ratio(100, 500, sizes)
    assert match.cropped == pytest.approx(0.2)
    assert match.cropped <= MAX_CROP, "exactly 20 % is kept"
    assert nearest_ratio(100, 501, sizes).cropped > MAX_CROP
    # Width / height of 1.75 is as far from 3:2 as from 2:1: the nearer in pixels wins.
    assert nearest_ratio(400, 700, sizes).size == (384, 768)
    assert nearest_ratio(100, 175, sizes).size == (384, 576)


@given(sides, sides)
def test_nearest_ratio_is_the_nearest(height, width):
    sizes = ratio_sizes(256)
    match = nearest_ratio(height, width, sizes)
    best = min(abs(w / h - width / height) for h, w in sizes)
    assert abs(match.size[1] / match.size[0] - width / height) == best
    assert 0 <= match.cropped < 1
    # Against the crop done step by step: scale to cover, keep the centre.
    scale = max(match.size[0] / height, match.size[1] / width)
    kept = match.size[0] * match.size[1] / (scale * height * scale * width)
    assert match.cropped == pytest.approx(1 - kept, abs=1e-9)


def test_cropped_fraction_is_symmetric():
    assert cropped_fraction(100, 200, (100, 100)) == cropped_fraction(200, 100, (100, 100)) == 0.5


@pytest.mark.parametrize(
    ("size", "max_side", "expected"),
    [
        ((512, 512), 512, (512, 512)),
        ((500, 375), 512, (496, 368)),  # 31.25 and 23.44 steps
        ((40, 56), 512, (32, 64)),  # halves round to even: 2.5 -> 2, 3.5 -> 4
        ((1000, 1000), 512, (512, 512)),
        ((600, 800), 512, (432, 576)),  # 443.4 and 591.2, rounded down
        ((384, 512), 256, (208, 288)),  # the release's example at a fixed area
        ((10, 10), 512, (32, 32)),
        ((8, 1000), 512, (16, 368)),
        ((20, 100000), 512, (16, 36192)),  # so long that the area cap gives way
    ],
)
def test_any_resolution(size, max_side, expected):
    assert any_resolution(*size, max_side) == expected


@given(sides, sides, st.integers(32, 1024))
def test_any_resolution_keeps_its_bounds(height, width, max_side):
    new_height, new_width = any_resolution(height, width, max_side)
    assert new_height % 16 == new_width % 16 == 0
    assert min(new_height, new_width) >= 16
    if min(new_height, new_width) > 16:
        assert new_height * new_width <= max_side**2 or height * width < 32**2
    if min(height, width) > 40 and (height + 8) * (width + 8) <= max_side**2:
        assert max(abs(new_height - height), abs(new_width - width)) <= 8
    assert any_resolution(width, height, max_side) == (new_width, new_height)


def test_any_resolution_refuses():
    with pytest.raises(ValueError, match="0 x 5"):
        any_resolution(0, 5, 512)
    with pytest.raises(ValueError, match="max_side 16"):
        any_resolution(64, 64, 16)
