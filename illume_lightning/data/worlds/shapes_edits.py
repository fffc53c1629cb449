"""Edits of scenes of the shapes world: an instruction that names one change, and the scene it leads to."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Literal, NamedTuple

import numpy as np

from illume_lightning.data.worlds.shapes import (
    COLOURS,
    PLACES,
    RADII,
    SHAPES,
    Object,
    Scene,
    phrase,
    split_of,
)  # fmt: skip

EditKind = Literal["recolour", "remove", "add", "move"]


class Edit(NamedTuple):
    """A change of a scene."""

    kind: EditKind
    """What is changed."""

    instruction: str
    """In words, without a full stop; names its object with its place."""

    scene: Scene
    """The result; never the scene it was."""


def edits(scene: Scene) -> Iterator[Edit]:
    """All edits of a scene, always in the same order."""
    free = [place for place in PLACES if all(thing.place != place for thing in scene.objects)]
    for thing in scene.objects:
        name = f"the {phrase(thing).removeprefix('a ')}"
        others = tuple(other for other in scene.objects if other != thing)
        yield Edit("remove", f"remove {name}", replace(scene, objects=others))
        for colour in COLOURS:
            if colour != thing.colour:
                recoloured = replace(scene, objects=(*others, replace(thing, colour=colour)))
                yield Edit("recolour", f"change the color of {name} to {colour}", recoloured)
        for place in free:
            moved = replace(scene, objects=(*others, replace(thing, place=place)))
            yield Edit("move", f"move {name} to the {place}", moved)
    for shape, colour, size, place in product(SHAPES, COLOURS, RADII, free):
        added = Object(shape, colour, size, place)
        yield Edit("add", f"add {phrase(added)}", replace(scene, objects=(*scene.objects, added)))


def draw_edit(scene: Scene, kind: EditKind, random: np.random.Generator) -> Edit | None:
    """One edit of a kind that leads to a scene of the same split.

    So neither the instruction nor the result has a pair of colour and shape that the split must not have.

    Returns:
        None if no such edit stays in the split, which in the small ones happens often.
    """
    split = split_of(scene)
    among = [edit for edit in edits(scene) if edit.kind == kind and split_of(edit.scene) == split]
    return among[random.integers(len(among))] if among else None
