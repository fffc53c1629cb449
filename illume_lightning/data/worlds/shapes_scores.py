"""Scores of generated and edited pictures of the shapes world, by what the checker reads in them.

The categories of a generated picture are those of GenEval (Ghosh et al., arXiv 2310.11513): single object, two
objects, counting, colours, position and colour attribution. GenEval asks each of prompts of its own and leaves
to a detector what is there; here every scene is scored in all that apply to it, and the checker reads the
picture. What is unclear in a picture counts as not there, never as right.
"""

from collections import Counter

import numpy as np

from illume_lightning.data.worlds.shapes import Object, Scene
from illume_lightning.data.worlds.shapes_checker import Seen, read_scene
from illume_lightning.data.worlds.shapes_edits import edits


def score_picture(wanted: Scene, picture: np.ndarray) -> dict[str, bool]:
    """Judge a generated picture against the scene that it should show.

    Each category looks at its own attributes alone, and a surplus object fails none but "counting" and "scene", as
    in GenEval:

    - "scene": the picture shows the scene exactly, sizes and background too, and nothing else.
    - "single_object", scenes of 1 object: its shape is there.
    - "two_objects", scenes of 2 objects: both shapes are there; twice, if they are the same.
    - "counting": there are as many things as wanted, whatever they are.
    - "colours", scenes of at least 1 object: the wanted colours are there, each on as many things as wanted, of
      whatever shape. GenEval asks for the colour of a named object; of several, that is "colour_attribution".
    - "position", scenes of at least 1 object: at each object's place stands its shape. GenEval asks how two
      objects lie to each other; here places are absolute.
    - "colour_attribution", scenes of at least 2 objects: each wanted pair of shape and colour is there, as often as
      wanted.

    Args:
        wanted: The scene.
        picture: RGB, uint8 (H, W, 3), 0 to 255, each side from 16 pixels.

    Returns:
        The categories that apply to the scene, and whether each holds.

    Raises:
        ValueError: If the picture has another type or shape.
    """
    reading = read_scene(picture)
    parts, things = reading.parts, wanted.objects

    def there(*names: str) -> bool:
        """Whether the wanted values of some attributes, taken together, are there as often as wanted."""
        return _values(things, names) <= _values(parts, names)

    scores = {"scene": reading.scene == wanted, "counting": len(parts) == len(things)}
    if len(things) == 1:
        scores["single_object"] = there("shape")
    if len(things) == 2:
        scores["two_objects"] = there("shape")
    if things:
        scores["colours"] = there("colour")
        scores["position"] = there("shape", "place")
    if len(things) >= 2:
        scores["colour_attribution"] = there("shape", "colour")
    return scores


def score_edit(source: Scene, wanted: Scene, picture: np.ndarray) -> dict[str, bool]:
    """Judge an edited picture: is what was asked for done, and is the rest as it was?

    - "edit": the picture shows the wanted scene exactly.
    - "followed": recolour: at the object's place stands one thing, of its shape and the new colour. Remove: nothing
      stands there. Add: at the new object's place stands it alone, also in size. Move: so it does at its new place, and
      nothing stands at the old one.
    - "untouched": the background is the source's, and beside the places that the edit names stand all the other
      objects of the source in shape, colour, size and place, and nothing else.

    A thing that no place can be told of is beside the named places, and nothing can be said to stand nowhere
    near it: it fails "untouched", and "followed" if a place should be empty. Of an edit that is recognised but for
    the size of a recoloured object both hold, and "edit" does not.

    Args:
        source: What the picture showed before.
        wanted: What it should show, one edit away, see `edits`.
        picture: RGB, uint8 (H, W, 3), 0 to 255, each side from 16 pixels; the new one.

    Returns:
        Whether each of the three holds.

    Raises:
        ValueError: If no edit leads from the source to the wanted scene, or the picture has another type or shape.
    """
    if all(edit.scene != wanted for edit in edits(source)):
        raise ValueError(
            f"no edit leads from {source.to_json()} to {wanted.to_json()}; give scenes one apart"
        )
    reading = read_scene(picture)
    before = {thing.place: thing for thing in source.objects}
    after = {thing.place: thing for thing in wanted.objects}
    named = {place for place in before | after if before.get(place) != after.get(place)}
    beside = Counter(part.object for part in reading.parts if part.place not in named)
    kept = Counter(thing for place, thing in before.items() if place not in named)
    return {
        "edit": reading.scene == wanted,
        "followed": all(_changed(reading.parts, place, before, after) for place in named),
        "untouched": reading.background == source.background and beside == kept,
    }


def _values(things: tuple[Object | Seen, ...], names: tuple[str, ...]) -> Counter[tuple[str | None, ...]]:
    """How often each combination of some attributes' values occurs."""
    return Counter(tuple(getattr(thing, name) for name in names) for thing in things)


def _changed(
    parts: tuple[Seen, ...], place: str, before: dict[str, Object], after: dict[str, Object]
) -> bool:
    """Whether what an edit asks for at one place, the objects there before and after, has been done."""
    here = [part for part in parts if part.place == place]
    wanted = after.get(place)
    if wanted is None:
        return not here and all(part.place for part in parts)
    if len(here) != 1:
        return False
    if place in before:  # recoloured
        return (here[0].shape, here[0].colour) == (wanted.shape, wanted.colour)
    return here[0].object == wanted
