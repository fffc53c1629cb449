"""The shapes world: scenes of coloured shapes, generated from a seed, on canvases of any size.

A scene is a background and up to four objects, each in its own quarter of the canvas. Everything about
it is known, so captions, masks, questions and edits follow from it, and a picture can be checked against
it. Pictures are rendered from signed distances with analytic anti-aliasing: no fonts, no files.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 165, 60),
    "blue": (50, 80, 230),
    "yellow": (240, 210, 40),
    "purple": (150, 60, 190),
    "orange": (245, 135, 30),
    "cyan": (60, 205, 220),
}
"""Names and RGB values, 0 to 255."""
RADII = {"small": 0.30, "large": 0.42}
"""Sizes of objects: radius as a share of the shorter side of a cell."""
BACKGROUNDS = {"white": (245, 245, 245), "black": (20, 20, 20)}
PLACES = ("top left", "top right", "bottom left", "bottom right")
"""The cells of the canvas, in reading order: two rows of two."""
SPLITS = ("train", "val", "test", "compositional")
UNSEEN_PAIRS = (("purple", "circle"), ("cyan", "square"), ("orange", "triangle"), ("green", "star"))
"""Colours and shapes that stand together in the split "compositional" alone: no other split shows or names
them, so whoever makes such an object there has put together what was only learned apart."""
SEEN_PAIRS = tuple(pair for pair in product(COLOURS, SHAPES) if pair not in UNSEEN_PAIRS)
HELD_OUT = 0.05
"""Share of the scenes without unseen pairs that belongs to "val", and the same again to "test"."""


@dataclass(frozen=True)
class Object:
    """One shape: what it is, and in which cell it stands.

    Args:
        shape: One of `SHAPES`.
        colour: One of `COLOURS`.
        size: One of `RADII`.
        place: One of `PLACES`.

    Raises:
        ValueError: If a name is unknown.
    """

    shape: str
    colour: str
    size: str
    place: str

    def __post_init__(self) -> None:
        for name, known in (("shape", SHAPES), ("colour", COLOURS), ("size", RADII), ("place", PLACES)):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} '{getattr(self, name)}'; known are {', '.join(known)}")


@dataclass(frozen=True)
class Scene:
    """A background and the objects on it, in reading order of their cells.

    Args:
        background: One of `BACKGROUNDS`.
        objects: 0 to 4 objects in different cells; they are put into reading order.

    Raises:
        ValueError: If the background is unknown or two objects share a cell.
    """

    background: str
    objects: tuple[Object, ...]

    def __post_init__(self) -> None:
        if self.background not in BACKGROUNDS:
            raise ValueError(f"unknown background '{self.background}'; known are {', '.join(BACKGROUNDS)}")
        places = [thing.place for thing in self.objects]
        if len(set(places)) < len(places):
            raise ValueError(f"two objects share a place: {', '.join(places)}; give each its own")
        ordered = sorted(self.objects, key=lambda thing: PLACES.index(thing.place))
        object.__setattr__(self, "objects", tuple(ordered))

    @property
    def pairs(self) -> set[tuple[str, str]]:
        """Colours and shapes that stand together."""
        return {(thing.colour, thing.shape) for thing in self.objects}

    def to_json(self) -> str:
        """One line of JSON, the same for equal scenes."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> "Scene":
        """The scene that `to_json` wrote, or of the `meta` of a picture's record."""
        return Scene.from_dict(json.loads(text))

    @staticmethod
    def from_dict(content: dict[str, Any]) -> "Scene":
        """The scene of which this is the `asdict`, such as those in the `meta` of a conversation's record."""
        return Scene(content["background"], tuple(Object(**thing) for thing in content["objects"]))


def split_of(scene: Scene) -> str:
    """The split a scene belongs to, by its pairs, then by its hash: the same whoever draws it, from any seed."""
    if not scene.pairs.isdisjoint(UNSEEN_PAIRS):
        return "compositional"
    number = int.from_bytes(hashlib.sha256(scene.to_json().encode()).digest()[:8], "big") / 2**64
    if number < HELD_OUT:
        return "val"
    return "test" if number < 2 * HELD_OUT else "train"


def pairs_of(split: str) -> tuple[tuple[str, str], ...]:
    """The colours and shapes that may stand together in the scenes and in the texts of a split."""
    return (*SEEN_PAIRS, *UNSEEN_PAIRS) if split == "compositional" else SEEN_PAIRS


def draw_scene(
    seed: int, index: int, *, split: str = "train", min_objects: int = 1, max_objects: int = 4
) -> Scene:
    """Draw a scene; a function of its arguments alone.

    The split's pairs of colour and shape are equally likely, but each scene of "compositional" has an object of an
    unseen pair in any case.

    Args:
        seed: Seed of the world, 0 to 2^64 - 1.
        index: Number of the scene, 0 to 2^64 - 1.
        split: The scene comes from this split, see `split_of`.
        min_objects: Fewest objects; each number up to `max_objects` is equally likely.
        max_objects: Most objects, up to 4; from 1 where an empty scene is in another split.
    """
    random = random_stream(seed, index, SPLITS.index(split))
    pairs = pairs_of(split)
    first = UNSEEN_PAIRS if split == "compositional" else pairs
    while True:
        count = int(random.integers(min_objects, max_objects + 1))
        places = random.permutation(len(PLACES))[:count]
        background = tuple(BACKGROUNDS)[random.integers(len(BACKGROUNDS))]
        objects = []
        for number, place in enumerate(places):
            among = pairs if number else first
            colour, shape = among[random.integers(len(among))]
            size = tuple(RADII)[random.integers(len(RADII))]
            objects.append(Object(shape, colour, size, PLACES[place]))
        scene = Scene(background, tuple(objects))
        if split_of(scene) == split:
            return scene


def phrase(thing: Object) -> str:
    """An object in words, naming exactly one thing: "a small red star at the top left"."""
    return f"{appearance(thing)} at the {thing.place}"


def appearance(thing: Object) -> str:
    """An object in words, without its place: "a small red star"."""
    return f"a {thing.size} {thing.colour} {thing.shape}"


def record_meta(scene: Scene) -> str:
    """The `meta` of a scene's record: the scene, and `regions`, its objects' names and cells.

    A region is [name, top, left, bottom, right], edges as shares of the picture's height and width.
    """
    regions = []
    for thing in scene.objects:
        row, column = divmod(PLACES.index(thing.place), 2)
        regions.append([appearance(thing), row / 2, column / 2, (row + 1) / 2, (column + 1) / 2])
    return json.dumps({**asdict(scene), "regions": regions}, sort_keys=True, separators=(",", ":"))


def caption(scene: Scene) -> str:
    """A scene in words, complete and always the same: the objects in reading order, then the background."""
    background = f"on a {scene.background} background"
    if not scene.objects:
        return f"nothing {background}"
    *phrases, last = (phrase(thing) for thing in scene.objects)
    return f"{', '.join(phrases)} and {last} {background}" if phrases else f"{last} {background}"


def render(scene: Scene, height: int, width: int) -> np.ndarray:
    """Draw a scene.

    Args:
        scene: What to draw.
        height: Height H of the canvas in pixels.
        width: Width W of the canvas in pixels.

    Returns:
        RGB, uint8 (H, W, 3), 0 to 255.
    """
    background = np.array(BACKGROUNDS[scene.background], np.float32)
    canvas = np.empty((height, width, 3), np.uint8)
    canvas[:] = BACKGROUNDS[scene.background]
    for thing in scene.objects:
        rows, columns, coverage = _placed(thing, height, width)
        colour = np.array(COLOURS[thing.colour], np.float32)
        mixed = background + coverage[..., None] * (colour - background)
        canvas[rows, columns] = (mixed + 0.5).astype(np.uint8)  # cells do not overlap: nothing is drawn twice
    return canvas


def object_masks(scene: Scene, height: int, width: int) -> np.ndarray:
    """How much of each pixel each object covers.

    Args:
        scene: The scene.
        height: Height H of the canvas in pixels.
        width: Width W of the canvas in pixels.

    Returns:
        float32 (N, H, W), 0 to 1, in the order of `scene.objects`.
    """
    masks = np.zeros((len(scene.objects), height, width), np.float32)
    for mask, thing in zip(masks, scene.objects, strict=True):
        rows, columns, coverage = _placed(thing, height, width)
        mask[rows, columns] = coverage
    return masks


def random_stream(seed: int, index: int, stream: int) -> np.random.Generator:
    """A generator that depends on its arguments only; streams of the same seed and index do not overlap.

    The numbers of the splits in `SPLITS` are the streams of their scenes.
    """
    key, counter = np.array([seed, index], np.uint64), np.array([0, 0, 0, stream], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def _placed(thing: Object, height: int, width: int) -> tuple[slice, slice, np.ndarray]:
    """The rows and columns of an object's cell, and how much of each pixel it covers there."""
    row, column = divmod(PLACES.index(thing.place), 2)
    rows = slice(row * height // 2, (row + 1) * height // 2)
    columns = slice(column * width // 2, (column + 1) * width // 2)
    radius = RADII[thing.size] * min(height, width) / 2
    return rows, columns, _coverage(thing.shape, radius, rows.stop - rows.start, columns.stop - columns.start)


@lru_cache(maxsize=256)
def _coverage(shape: str, radius: float, height: int, width: int) -> np.ndarray:
    """How much of each pixel a shape in the middle of a cell covers, float32 (height, width), 0 to 1."""
    y = (np.arange(height) + 0.5 - height / 2)[:, None] / radius
    x = (np.arange(width) + 0.5 - width / 2)[None, :] / radius
    distance = np.hypot(x, y) - 1 if shape == "circle" else _polygon_distance(_OUTLINES[shape], x, y)
    coverage = np.clip(0.5 - distance * radius, 0, 1).astype(np.float32)
    coverage.flags.writeable = False  # shared by all callers
    return coverage


def _polygon_distance(corners: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to a polygon, negative inside.

    Args:
        corners: (K, 2) of x and y, in order around the polygon.
        x: (1, W).
        y: (H, 1).

    Returns:
        (H, W), in the unit of the arguments.
    """
    nearest = np.full(np.broadcast_shapes(x.shape, y.shape), np.inf)
    inside = np.zeros(nearest.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        ex, ey = bx - ax, by - ay
        along = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, np.hypot(x - ax - along * ex, y - ay - along * ey))
        if ay != by:  # a ray to the right crosses this edge: even-odd rule
            inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) * ex / ey)
    return np.where(inside, -nearest, nearest)


def _ring(radii: Sequence[float]) -> np.ndarray:
    """Corners at equal angles around the centre, the first at the top (y points down): (K, 2) of x and y."""
    angles = np.arange(len(radii)) * 2 * np.pi / len(radii)
    return np.stack([np.sin(angles), -np.cos(angles)], axis=1) * np.array(radii)[:, None]


# For radius 1. The square has the circle's area; the triangle is moved down to the middle of its cell.
_OUTLINES = {
    "square": np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * np.sqrt(np.pi) / 2,
    "triangle": _ring([1.15] * 3) + np.array([0, 1.15 / 4]),
    "star": _ring([1.1, 0.5] * 5),
}
