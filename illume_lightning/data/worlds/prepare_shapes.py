"""Stores of pictures of the shapes world."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from illume_lightning.data.image import encode_png
from illume_lightning.data.part import Lost, Sample
from illume_lightning.data.store import Manifest
from illume_lightning.data.worlds.shapes import (
    PLACES,
    SPLITS,
    UNSEEN_PAIRS,
    caption,
    draw_scene,
    random_stream,
    record_meta,
    render,
)
from illume_lightning.data.writer import write_stores
from illume_lightning.resolution import Size, ratio_sizes

_PART_ITEMS = 1024
_SIZES = 1000  # stream of random numbers


def prepare_shapes(
    output: str | Path,
    *,
    count: int,
    seed: int = 0,
    split: str = "train",
    sizes: Sequence[Size] | None = None,
    ratios: int | None = None,
    min_objects: int = 1,
    max_objects: int = 4,
    chunk_megabytes: int = 64,
    num_workers: int = 0,
    overwrite: bool = False,
) -> dict[str, Manifest]:
    """Write a store of shapes with captions; `meta` of each record is the scene and its regions.

    Args:
        output: The folder to make.
        count: Number of pictures.
        seed: Another seed gives other pictures.
        split: "train", "val", "test" or "compositional"; no scene is ever in two of them. The last has pairs of
            colour and shape that the others never have.
        sizes: Heights and widths in pixels; each picture gets one of them at random. By default 224 x 224.
        ratios: In place of sizes, a side in pixels: half of the pictures are squares of it, the others have the
            paper's other 10 aspect ratios at about its area.
        min_objects: Fewest objects in a picture, from 1.
        max_objects: Most objects in a picture, up to 4.
        chunk_megabytes: Size of a chunk file in MB.
        num_workers: Processes; 0 works in this one. The result does not depend on it.
        overwrite: Replace a store that was made with other options.

    Returns:
        The manifest of the store, under "".

    Raises:
        ValueError: If an option is out of range, or `output` holds something else.
    """
    drawn = picture_sizes(sizes, ratios)
    check_options(count, seed, split, drawn, min_objects, max_objects)
    identity = {
        "kind": "shapes", "count": count, "seed": seed, "split": split, "unseen_pairs": UNSEEN_PAIRS,
        "sizes": drawn, "min_objects": min_objects, "max_objects": max_objects,
    }  # fmt: skip
    return write_stores(
        output,
        identity,
        lambda: [
            ShapesPart(indices, seed, split, drawn, min_objects, max_objects)
            for indices in part_indices(count)
        ],
        chunk_megabytes=chunk_megabytes,
        num_workers=num_workers,
        overwrite=overwrite,
    )


def picture_sizes(sizes: Sequence[Size] | None, ratios: int | None) -> tuple[Size, ...]:
    """The sizes that `prepare_shapes` draws from with equal chances; `ratios` repeat the square.

    Raises:
        ValueError: If both options are given, or the side of the ratios is too small.
    """
    if ratios is None:
        given = ((224, 224),) if sizes is None else sizes
        return tuple((int(height), int(width)) for height, width in given)
    if sizes is not None:
        raise ValueError(f"sizes is {sizes} and ratios is {ratios}; give one of them")
    square, *others = ratio_sizes(ratios)
    return (*[square] * len(others), *others)


def check_options(
    count: int, seed: int, split: str, sizes: tuple[Size, ...], min_objects: int, max_objects: int
) -> None:
    """Refuse options of `prepare_shapes` that are out of range."""
    if count < 1:
        raise ValueError(f"count is {count}; at least 1 picture is needed")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}; it must be between 0 and 2^64 - 1")
    if split not in SPLITS:
        raise ValueError(f"split is '{split}'; it must be one of {', '.join(SPLITS)}")
    if not 1 <= min_objects <= max_objects <= len(PLACES):
        raise ValueError(
            f"min_objects={min_objects} and max_objects={max_objects} do not fit; "
            f"1 <= min_objects <= max_objects <= {len(PLACES)}"
        )
    if not sizes or min(map(min, sizes)) < 16:
        raise ValueError(f"sizes is {sizes}; give at least one pair of height and width, each from 16 pixels")


def part_indices(count: int) -> list[range]:
    """Numbers of the records of each part."""
    return [range(count)[start : start + _PART_ITEMS] for start in range(0, count, _PART_ITEMS)]


@dataclass(frozen=True)
class ShapesPart:
    """Some numbers of the pictures that `prepare_shapes` writes."""

    indices: range
    seed: int
    split: str
    sizes: tuple[Size, ...]
    min_objects: int
    max_objects: int

    @property
    def num_items(self) -> int:
        """Number of pictures."""
        return len(self.indices)

    def read(self) -> Iterator[Sample | Lost]:
        """Draw the pictures."""
        for index in self.indices:
            scene = draw_scene(
                self.seed, index, split=self.split, min_objects=self.min_objects, max_objects=self.max_objects
            )
            # A stream of its own: the scenes do not change with the list of sizes.
            height, width = self.sizes[random_stream(self.seed, index, _SIZES).integers(len(self.sizes))]
            image = encode_png(render(scene, height, width), compress_level=1)
            yield Sample(str(index), image, caption(scene), record_meta(scene), height, width)
