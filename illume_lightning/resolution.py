"""Image sizes: the one place that knows how pictures become grids, which ratios exist, and how sizes round.

All sizes are (height, width) in pixels unless a name says otherwise. Standard library only.
"""

import math
from collections.abc import Sequence
from types import MappingProxyType
from typing import NamedTuple

Size = tuple[int, int]
"""Height and width, in pixels for pictures and in cells for grids."""

PIXEL_STRIDE = 16
"""Pixels per cell of the pixel grid, in both directions; every picture size is a multiple of it."""

SEMANTIC_STRIDE = 28
"""Pixels of the semantic branch's input per cell of the semantic grid: two ViT patches of 14."""

MAX_CROP = 0.2
"""Pictures that lose more than this share of their content to a crop are left out (paper 3.4)."""

RATIO_SIDE = 512
"""Side whose square is the area at which `RATIO_ANCHORS` is given."""

RATIO_ANCHORS: tuple[Size, ...] = (
    (512, 512),
    (384, 512),
    (512, 384),
    (384, 768),
    (768, 384),
    (384, 576),
    (576, 384),
    (320, 960),
    (960, 320),
    (256, 1024),
    (1024, 256),
)
"""The paper's 11 aspect ratios 1:1, 3:4, 4:3, 1:2, 2:1, 2:3, 3:2, 1:3, 3:1, 1:4, 4:1 near 512 x 512 pixels,
as (height, width), in the official release's sizes and order."""

SEMANTIC_INPUT_SIZES: MappingProxyType[Size, Size] = MappingProxyType(
    {
        (256, 256): (252, 252),
        (512, 512): (504, 504),
        (512, 384): (448, 336),
        (384, 512): (336, 448),
        (768, 384): (728, 364),
        (384, 768): (364, 728),
        (1024, 256): (1008, 252),
        (256, 1024): (252, 1008),
        (384, 576): (336, 504),
        (576, 384): (504, 336),
        (960, 320): (924, 308),
        (320, 960): (308, 924),
    }
)
"""Picture size to the size that the semantic branch sees, where the official release fixes it: here the
aspect ratio survives exactly, which plain rounding down to multiples of 28 would not keep."""

DECODER_SIZES: tuple[Size, ...] = (
    (1024, 1024),
    (1024, 768),
    (768, 1024),
    (2048, 512),
    (512, 2048),
    (1920, 640),
    (640, 1920),
    (1536, 768),
    (768, 1536),
    (1152, 768),
    (768, 1152),
    (512, 512),
)
"""Output sizes of the published diffusion decoder as (height, width), in the order in which its pipeline counts
them: there the strings read (width, height)."""


class Grids(NamedTuple):
    """Rows and columns of the two code grids of a picture."""

    semantic: Size
    pixel: Size


class RatioMatch(NamedTuple):
    """The size a picture is fitted to, and the share of its content (0 to 1) that the centre crop removes."""

    size: Size
    cropped: float


def semantic_input_size(height: int, width: int) -> Size:
    """Size to which the semantic branch scales a picture: multiples of 28 pixels.

    The released table where it has the size, else each side rounded down to a multiple of 28, at least 28
    (official release).

    Args:
        height: of the picture, in pixels.
        width: of the picture, in pixels.
    """
    return SEMANTIC_INPUT_SIZES.get((height, width)) or (
        _multiple_below(height, SEMANTIC_STRIDE),
        _multiple_below(width, SEMANTIC_STRIDE),
    )


def grids(height: int, width: int) -> Grids:
    """Code grids of a picture.

    Args:
        height: of the picture in pixels, a multiple of 16.
        width: of the picture in pixels, a multiple of 16.

    Raises:
        ValueError: if a side is not a positive multiple of 16.
    """
    check_size(height, width)
    semantic_height, semantic_width = semantic_input_size(height, width)
    return Grids(
        semantic=(semantic_height // SEMANTIC_STRIDE, semantic_width // SEMANTIC_STRIDE),
        pixel=(height // PIXEL_STRIDE, width // PIXEL_STRIDE),
    )


def check_size(height: int, width: int) -> None:
    """Refuse a size that has no pixel grid.

    Raises:
        ValueError: if a side is not a positive multiple of 16; names the nearest size that is.
    """
    nearest = (_nearest_multiple(height), _nearest_multiple(width))
    if nearest == (height, width):
        return
    raise ValueError(
        f"picture size {height} x {width} (height x width): both sides must be positive multiples of "
        f"{PIXEL_STRIDE} pixels; the nearest such size is {nearest[0]} x {nearest[1]}"
    )


def ratio_sizes(side: int, step: int = PIXEL_STRIDE) -> tuple[Size, ...]:
    """The 11 aspect ratios at an area near `side` x `side` pixels (paper 3.4).

    At 512 these are exactly the official release's anchors; elsewhere the anchors scaled and rounded to
    multiples of 16 pixels, at least 16.

    Args:
        side: square root of the area, in pixels.
        step: both sides are multiples of this many pixels, itself a multiple of 16.

    Returns:
        11 sizes in the order of `RATIO_ANCHORS`; at very small areas some of them coincide.

    Raises:
        ValueError: if `side` is below 16.
    """
    if side < PIXEL_STRIDE:
        raise ValueError(f"side {side}: the smallest picture has a side of {PIXEL_STRIDE} pixels")
    scale = side / RATIO_SIDE
    return tuple(
        (_nearest_multiple(h * scale, step), _nearest_multiple(w * scale, step)) for h, w in RATIO_ANCHORS
    )


def decoder_size_index(size: Size, sizes: Sequence[Size], transposed: bool = False) -> int:
    """Which of the diffusion decoder's output sizes a size is: its micro-condition.

    A size that is not in the list takes the number of the one with its aspect ratio: the paper's first stage
    trains 11 ratios near 512 x 512, the official release counts only 512 x 512 of them.

    Args:
        size: of the output.
        sizes: the list, such as `DECODER_SIZES`.
        transposed: look up (width, height) instead. The official release's pipeline and the leftovers of its
            training code read the list in different orders, so published weights may need either.

    Raises:
        ValueError: if no listed size has that ratio.
    """
    height, width = reversed(size) if transposed else size
    if (height, width) in sizes:
        return sizes.index((height, width))
    for number, (listed_height, listed_width) in enumerate(sizes):
        # Sizes round to multiples of 16, so ratios differ by up to half a cell.
        if abs(height * listed_width / listed_height - width) <= PIXEL_STRIDE / 2:
            return number
    listed = ", ".join(f"{h} x {w}" for h, w in sizes)
    raise ValueError(
        f"output size {size[0]} x {size[1]} (height x width): the diffusion decoder has none of this aspect "
        f"ratio; its sizes are {listed}"
    )


def cropped_fraction(height: int, width: int, size: Size) -> float:
    """Share of a picture (0 to 1) that is lost when it is scaled to cover `size` and cropped to it."""
    ratios = width * size[0], height * size[1]
    return 1.0 - min(ratios) / max(ratios)


def nearest_ratio(height: int, width: int, sizes: Sequence[Size]) -> RatioMatch:
    """The size whose aspect ratio is nearest to a picture's.

    Nearest is the smallest difference of width / height; ties go to the size nearest in pixels, then to the
    earlier one (official release).

    Args:
        height: of the picture, in pixels.
        width: of the picture, in pixels.
        sizes: candidates, such as `ratio_sizes(512)`.
    """
    ratio = width / height

    def distance(size: Size) -> tuple[float, int]:
        return abs(size[1] / size[0] - ratio), (size[0] - height) ** 2 + (size[1] - width) ** 2

    best = min(sizes, key=distance)
    return RatioMatch(best, cropped_fraction(height, width, best))


def any_resolution(height: int, width: int, max_side: int, min_side: int = 32) -> Size:
    """Nearest size to a picture's own that has a pixel grid and an area between two bounds.

    Both sides round to multiples of 16 (half to even). Above the largest area they shrink by one factor and
    round down, below the smallest they grow by one factor and round up; no side falls below 16. Pictures
    more than about `max_side` / 16 times as long as wide can therefore exceed the largest area (all as in
    the official release).

    Args:
        height: of the picture, in pixels.
        width: of the picture, in pixels.
        max_side: square root of the largest area, in pixels.
        min_side: square root of the smallest area, in pixels.

    Raises:
        ValueError: if the picture is empty, or `max_side` is below `min_side`.
    """
    if height < 1 or width < 1:
        raise ValueError(f"picture size {height} x {width} (height x width): both sides must be positive")
    if max_side < min_side:
        raise ValueError(f"max_side {max_side} is below min_side {min_side}; raise max_side")
    step = PIXEL_STRIDE
    new_height, new_width = round(height / step) * step, round(width / step) * step
    if new_height * new_width > max_side**2:
        shrink = math.sqrt(height * width / max_side**2)
        new_height = math.floor(height / shrink / step) * step
        new_width = math.floor(width / shrink / step) * step
    elif new_height * new_width < min_side**2:
        grow = math.sqrt(min_side**2 / (height * width))
        new_height = math.ceil(height * grow / step) * step
        new_width = math.ceil(width * grow / step) * step
    return max(step, new_height), max(step, new_width)


def _multiple_below(length: int, step: int) -> int:
    return max(step, length // step * step)


def _nearest_multiple(length: float, step: int = PIXEL_STRIDE) -> int:
    return max(step, round(length / step) * step)
