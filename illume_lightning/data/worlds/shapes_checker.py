"""Read a picture of the shapes world back into objects, and compare what it shows with a scene.

No learned model: the border gives the background, what differs from it falls into connected parts, and
each part's coverage, between the background's colour and its own, is held against the world's shapes at
several blurs. So a picture that a tokenizer or a diffusion decoder softened is still read, and a part
that is none of the world's objects is reported as unclear and never guessed. Sharp pictures are read from
about 24 pixels a side; below, and with strong blur below about 80, shapes become unclear but not wrong,
save that a small star under strong blur and coding artefacts together can read as a circle.
A pentagon or a polygon of more sides is nearer to the circle than a blurred circle is and reads as one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from illume_lightning.data.worlds.shapes import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    RADII,
    SHAPES,
    Object,
    Scene,
    object_masks,
)

CATEGORIES = ("count", "colours", "shapes", "sizes", "places", "background")
"""What a `Verdict` judges."""

_SMALLEST_PICTURE = 16
_FOREGROUND = 60.0
"""Distance in RGB from which a pixel is not background; the faintest pair, green on black, is 152 apart."""
_SPECK = 0.15
"""Parts of less than this many squared radii of a small object are dirt; a small star has 1.6."""
_SOFT_EDGE = 4
"""Fewest pixels that a part's soft edge may be wide: two standard deviations of a blur of 2 pixels."""
_DIRTY = 0.25
"""Largest share of the picture that may be dirt; with more, the background is none of the world's."""
_NEAR_COLOUR = 60.0
"""Farthest a named colour may be from what is seen. Yellow and orange, the closest, are 76 apart."""
_ALIKE = 0.75
"""Least share of a colour's pixels that must be nearest to its name: a part of two colours has none."""
_NEAR_SHAPE = 0.13
"""Most coverage that may differ, as a share of the shape's area. Circle and square differ by 0.18."""
_LEAD = 0.9
"""The best name is clear if it misses by at most this share of what the second best misses by."""
_NEAR_SIZE = 0.14
"""Most a radius may differ, as a share of the named one; small and large would meet at 0.167."""
_NEAR_PLACE = 0.3
"""Farthest a part's centre may be from its cell's, as a share of the cell's side; a triangle is 0.12 off."""
_LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)
_LUMINANCE_WEIGHT = 30.0
"""How much luminance counts beside RGB when coverage is measured: codecs blur colour far more."""
_GRID = 48
_REACH = 1.2
"""A shape is compared on a grid this many square roots of its area to each side of its centre."""
_CALM = 1.5
"""Standard deviation, in steps of the grid, of a blur of both sides against noise and coding artefacts."""
_BLURS = (0.0, 0.05, 0.1, 0.15, 0.2)
"""Standard deviations of the templates' blurs, as shares of the square root of the shape's area."""


@dataclass(frozen=True)
class Seen:
    """A part of a picture that is not background; what is not clear about it is None.

    Args:
        shape: One of `SHAPES`.
        colour: One of `COLOURS`.
        size: One of `RADII`; always None if the shape is, since the radius follows from shape and area.
        place: One of `PLACES`.
    """

    shape: str | None
    colour: str | None
    size: str | None
    place: str | None

    @property
    def object(self) -> Object | None:
        """The world's object that this is, if everything about it is clear."""
        if self.shape is None or self.colour is None or self.size is None or self.place is None:
            return None
        return Object(self.shape, self.colour, self.size, self.place)


@dataclass(frozen=True)
class Reading:
    """What a picture shows.

    Args:
        background: One of `BACKGROUNDS`, or None if it is none of them.
        parts: Everything that is not background, in reading order of the centres' cells.
    """

    background: str | None
    parts: tuple[Seen, ...]

    @property
    def scene(self) -> Scene | None:
        """The world's scene that this is: everything is clear and no two objects share a place."""
        objects = tuple(thing for part in self.parts if (thing := part.object) is not None)
        unclear = self.background is None or len(objects) < len(self.parts)
        if unclear or len({thing.place for thing in objects}) < len(objects):
            return None
        return Scene(str(self.background), objects)


@dataclass(frozen=True)
class Verdict:
    """How a reading agrees with a wanted scene, over the pairing of objects that agrees most.

    Args:
        wanted: Number of objects that the scene has.
        found: Number of parts that the picture has, unclear ones too.
        right: Wanted objects that are there in shape, colour, size and place.
        holds: For each of `CATEGORIES`, whether it holds: `count` if `found` equals `wanted`; `colours`,
            `shapes`, `sizes` and `places` if every wanted object has a partner that agrees in it, so
            a missing object fails all four and a surplus one only `count`; `background` if it is the same.
    """

    wanted: int
    found: int
    right: int
    holds: Mapping[str, bool]

    @property
    def exact(self) -> bool:
        """Whether the picture shows the scene and nothing else."""
        return all(self.holds.values())

    @property
    def failed(self) -> tuple[str, ...]:
        """The categories that do not hold."""
        return tuple(name for name in CATEGORIES if not self.holds[name])


def read_scene(picture: np.ndarray) -> Reading:
    """Read a rendered or generated picture.

    Args:
        picture: RGB, uint8 (H, W, 3), 0 to 255, each side from 16 pixels, as `render` makes it.

    Returns:
        The background and every part that differs from it; `Reading.scene` is the scene if all is clear.

    Raises:
        ValueError: If the picture has another type or shape.
    """
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(
            f"picture is {picture.dtype} of shape {picture.shape}; it must be RGB, uint8 (H, W, 3)"
        )
    if min(picture.shape[:2]) < _SMALLEST_PICTURE:
        raise ValueError(
            f"picture is {picture.shape[0]}x{picture.shape[1]}; "
            f"each side must have at least {_SMALLEST_PICTURE} pixels"
        )
    height, width = picture.shape[:2]
    pixels = picture.astype(np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    background = np.median(border, axis=0)
    foreground = np.linalg.norm(pixels - background, axis=2) > _FOREGROUND
    least = _SPECK * (RADII["small"] * min(height, width) / 2) ** 2
    parts = _components(_grow(_erode(foreground), steps=1), least)
    around = _grow(parts, steps=max(_SOFT_EDGE, round(0.04 * min(height, width))))
    found = [
        _read_part(pixels, background, parts == number, around == number)
        for number in range(1, int(parts.max()) + 1)
    ]
    found.sort(key=lambda item: item[0])
    plain = (foreground & (around == 0)).mean() <= _DIRTY
    name = _nearest_colour(border, BACKGROUNDS) if plain else None
    return Reading(name, tuple(seen for _, seen in found))


def compare(reading: Reading, wanted: Scene) -> Verdict:
    """Judge a reading against the scene that the picture should show.

    Args:
        reading: What `read_scene` read.
        wanted: The scene.
    """
    pairs = _pair(reading.parts, wanted.objects)
    agreements = [_agreement(part, thing) for part, thing in pairs]
    all_there = len(pairs) == len(wanted.objects)
    holds = {"count": len(reading.parts) == len(wanted.objects)}
    for number, name in enumerate(("colours", "shapes", "sizes", "places")):
        holds[name] = all_there and all(agreement[number] for agreement in agreements)
    holds["background"] = reading.background == wanted.background
    right = sum(all(agreement) for agreement in agreements)
    return Verdict(len(wanted.objects), len(reading.parts), right, holds)


def _agreement(part: Seen, thing: Object) -> tuple[bool, bool, bool, bool]:
    """Whether colour, shape, size and place are the same."""
    return (
        part.colour == thing.colour,
        part.shape == thing.shape,
        part.size == thing.size,
        part.place == thing.place,
    )


def _pair(parts: tuple[Seen, ...], wanted: tuple[Object, ...]) -> list[tuple[Seen, Object]]:
    """The pairing of parts and wanted objects with the most agreements, as many pairs as possible.

    Best pairings by the set of wanted objects that are taken: exact, and linear in the number of parts.
    """
    best: dict[frozenset[int], tuple[int, list[tuple[Seen, Object]]]] = {frozenset(): (0, [])}
    for part in parts:
        for taken, (score, pairs) in list(best.items()):
            for number, thing in enumerate(wanted):
                if number not in taken:
                    more = taken | {number}
                    total = score + sum(_agreement(part, thing))
                    if more not in best or total > best[more][0]:
                        best[more] = (total, [*pairs, (part, thing)])
    return max(best.items(), key=lambda item: (len(item[0]), item[1][0]))[1][1]


def _read_part(
    pixels: np.ndarray, background: np.ndarray, part: np.ndarray, around: np.ndarray
) -> tuple[tuple[int, float, float], Seen]:
    """Read one connected part.

    Args:
        pixels: float32 (H, W, 3).
        background: The background's colour, (3,).
        part: bool (H, W), its pixels.
        around: bool (H, W), its pixels and its soft edge.

    Returns:
        The place in reading order (cell, y, x) and what is seen.
    """
    height, width = part.shape
    core = pixels[_core(part)]
    y, x = (float(np.mean(axis)) + 0.5 for axis in np.nonzero(part))
    contrast = np.median(core, axis=0) - background
    shape = size = None
    if np.linalg.norm(contrast) > _FOREGROUND / 2:
        weighted = contrast + _LUMINANCE_WEIGHT * _LUMINANCE * (_LUMINANCE @ contrast)
        coverage = np.where(around, (pixels - background) @ weighted / (contrast @ weighted), 0)
        area = float(coverage.sum())
        if area > 1:
            y, x = _centre(coverage)
            shape = _nearest_shape(_normalised(coverage))
            size = _nearest_size(shape, area, min(height, width))
    row, column = min(max(int(2 * y / height), 0), 1), min(max(int(2 * x / width), 0), 1)
    cell = 2 * row + column
    offset = max(abs(2 * y / height - row - 0.5), abs(2 * x / width - column - 0.5))
    place = PLACES[cell] if offset <= _NEAR_PLACE else None
    return (cell, y, x), Seen(shape, _nearest_colour(core, COLOURS), size, place)


def _nearest_colour(pixels: np.ndarray, known: Mapping[str, tuple[int, int, int]]) -> str | None:
    """The known colour that these pixels, (N, 3), clearly are: their median and most of them."""
    values = np.array([*known.values()], np.float32)
    misses = np.linalg.norm(np.median(pixels, axis=0) - values, axis=1)
    nearest = np.linalg.norm(pixels[:, None] - values, axis=2).argmin(axis=1)
    alike = (nearest == misses.argmin()).mean() >= _ALIKE
    return _clear(dict(zip(known, misses.tolist(), strict=True)), _NEAR_COLOUR) if alike else None


def _nearest_shape(seen: np.ndarray) -> str | None:
    """The shape that a normalised coverage clearly is, at its best blur."""
    misses = {}
    for shape in SHAPES:
        templates = _templates(shape)
        misses[shape] = float((np.abs(seen - templates).sum((1, 2)) / templates.sum((1, 2))).min())
    return _clear(misses, _NEAR_SHAPE)


def _nearest_size(shape: str | None, area: float, side: int) -> str | None:
    """The size of a shape that covers `area` pixels, on a canvas whose shorter side is `side` pixels."""
    if shape is None:
        return None
    radius = np.sqrt(area / _unit_area(shape)) / (side / 2)
    return _clear({name: abs(radius / known - 1) for name, known in RADII.items()}, _NEAR_SIZE)


def _clear(misses: Mapping[str, float], most: float) -> str | None:
    """The name that misses by least, if by at most `most` and clearly less than the second."""
    first, second = sorted(misses, key=misses.__getitem__)[:2]
    return first if misses[first] <= min(most, _LEAD * misses[second]) else None


@lru_cache(maxsize=len(SHAPES))
def _unit_area(shape: str) -> float:
    """Area of a shape of radius 1."""
    side = 256
    return float(_drawn(shape, side).sum()) / (RADII["small"] * side / 2) ** 2


@lru_cache(maxsize=len(SHAPES))
def _templates(shape: str) -> np.ndarray:
    """A shape's normalised coverage at each blur, float32 (B, G, G)."""
    drawn = _drawn(shape, 256)
    scale = np.sqrt(drawn.sum())
    return np.stack([_normalised(_blurred(drawn, share * scale)) for share in _BLURS])


def _drawn(shape: str, side: int) -> np.ndarray:
    """Coverage of one small shape on a canvas, float32 (side, side)."""
    scene = Scene("white", (Object(shape, "red", "small", "top left"),))
    return object_masks(scene, side, side)[0]


def _blurred(values: np.ndarray, sigma: float) -> np.ndarray:
    """A Gaussian blur of square (N, N) values with zeros outside; `sigma` is in pixels."""
    if sigma == 0:
        return values
    offsets = np.arange(len(values))[:, None] - np.arange(len(values))
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi))
    return kernel @ values @ kernel


def _centre(coverage: np.ndarray) -> tuple[float, float]:
    """The centre of mass, y and x in pixels from the top left corner."""
    height, width = coverage.shape
    total = coverage.sum()
    y = coverage.sum(axis=1) @ (np.arange(height) + 0.5) / total
    x = coverage.sum(axis=0) @ (np.arange(width) + 0.5) / total
    return float(y), float(x)


def _normalised(coverage: np.ndarray) -> np.ndarray:
    """Coverage around its centre, scaled to the same area, so that place and size do not matter.

    Args:
        coverage: (H, W), 0 to 1 but for noise, of a sum above 0.

    Returns:
        float32 (G, G), sampled linearly; 0 outside the picture.
    """
    grid = np.linspace(-_REACH, _REACH, _GRID) * np.sqrt(coverage.sum())
    padded = np.pad(coverage, 1)
    rows, columns = (
        np.clip(grid + centre + 0.5, 0, limit - 1.001)
        for centre, limit in zip(_centre(coverage), padded.shape, strict=True)
    )
    top, left = rows.astype(int), columns.astype(int)
    down, right = (rows - top)[:, None], (columns - left)[None, :]
    upper = padded[np.ix_(top, left)] * (1 - right) + padded[np.ix_(top, left + 1)] * right
    lower = padded[np.ix_(top + 1, left)] * (1 - right) + padded[np.ix_(top + 1, left + 1)] * right
    return _blurred(upper * (1 - down) + lower * down, _CALM).astype(np.float32)


def _components(mask: np.ndarray, least: float) -> np.ndarray:
    """Number the connected parts (by edges, not corners) of at least `least` pixels.

    Args:
        mask: bool (H, W).
        least: Fewest pixels of a part.

    Returns:
        int (H, W): 1 to the number of parts, 0 elsewhere.
    """
    starts = mask & ~np.pad(mask, ((0, 0), (1, 0)))[:, :-1]
    runs = np.where(mask, np.cumsum(starts).reshape(mask.shape), 0)  # numbers of the runs of each row
    parent = list(range(int(runs.max()) + 1))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = run = parent[parent[run]]
        return run

    touching = mask[:-1] & mask[1:]
    for upper, lower in np.unique(np.stack([runs[:-1][touching], runs[1:][touching]], axis=1), axis=0):
        parent[root(int(lower))] = root(int(upper))
    roots = np.array([root(run) for run in range(len(parent))])[runs]
    sizes = np.bincount(roots.ravel(), minlength=len(parent))
    sizes[0] = 0  # the background
    numbers = np.zeros(len(parent), int)
    kept = np.flatnonzero(sizes >= max(least, 1))
    numbers[kept] = np.arange(1, len(kept) + 1)
    return numbers[roots]


def _core(mask: np.ndarray) -> np.ndarray:
    """The inner quarter of a part, away from its soft edge: bool (H, W), never empty."""
    enough = max(mask.sum() / 4, 1)
    while (inner := _erode(mask)).sum() >= enough:
        mask = inner
    return mask


def _neighbours(values: np.ndarray) -> tuple[np.ndarray, ...]:
    """The values above, below, left and right of each pixel, 0 outside: each (H, W)."""
    padded = np.pad(values, 1)
    return padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]


def _erode(mask: np.ndarray) -> np.ndarray:
    """The pixels whose four neighbours are in the mask too."""
    up, down, left, right = _neighbours(mask)
    return mask & up & down & left & right


def _grow(parts: np.ndarray, steps: int) -> np.ndarray:
    """Let a mask or numbered parts grow into the zeros by `steps` pixels; where two parts meet, they stop."""
    for _ in range(steps):
        parts = np.where(parts > 0, parts, np.maximum.reduce(_neighbours(parts)))
    return parts
