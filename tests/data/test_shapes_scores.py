"""Scores of the shapes world's pictures: the truth is right in all, and one fault is wrong in what it touches."""

import io
from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from PIL import Image, ImageFilter

from illume_lightning.data.worlds.shapes import BACKGROUNDS, SPLITS, Object, Scene, draw_scene, render
from illume_lightning.data.worlds.shapes_edits import Edit, EditKind, draw_edit, edits
from illume_lightning.data.worlds.shapes_scores import score_edit, score_picture

SIZE = (112, 112)
CIRCLE = Object("circle", "red", "large", "top left")
SQUARE = Object("square", "green", "small", "top right")
STAR = Object("star", "blue", "large", "bottom left")
ONE, TWO, THREE = (Scene("white", things) for things in ((CIRCLE,), (CIRCLE, SQUARE), (CIRCLE, SQUARE, STAR)))
APPLY = {
    0: {"scene", "counting"},
    1: {"scene", "single_object", "counting", "colours", "position"},
    2: {"scene", "two_objects", "counting", "colours", "position", "colour_attribution"},
    3: {"scene", "counting", "colours", "position", "colour_attribution"},
    4: {"scene", "counting", "colours", "position", "colour_attribution"},
}


def kept(picture: np.ndarray) -> np.ndarray:
    return picture


def blurred(picture: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(2)))


def compressed(picture: np.ndarray) -> np.ndarray:
    data = io.BytesIO()
    Image.fromarray(picture).save(data, "JPEG", quality=30)
    return np.asarray(Image.open(data))


def failed(scores: dict[str, bool]) -> set[str]:
    assert all(type(value) is bool for value in scores.values())
    return {name for name, holds in scores.items() if not holds}


def wrong(wanted: Scene, shown: Scene) -> set[str]:
    return failed(score_picture(wanted, render(shown, *SIZE)))


def with_first(scene: Scene, **changes: str) -> Scene:
    first, *others = scene.objects
    return replace(scene, objects=(replace(first, **changes), *others))


@pytest.mark.parametrize("damage", [kept, blurred, compressed])
def test_the_truth_is_right_in_all_that_applies(damage: Callable[[np.ndarray], np.ndarray]) -> None:
    for index in range(60):
        scene = draw_scene(4, index, split=SPLITS[index % 4], min_objects=0)
        scores = score_picture(scene, damage(render(scene, *((112, 112), (80, 160))[index % 2])))
        assert set(scores) == APPLY[len(scene.objects)]
        assert all(scores.values()), scene


@pytest.mark.parametrize("scene", [ONE, TWO, THREE], ids=["one", "two", "three"])
def test_each_fault_fails_what_it_touches(scene: Scene) -> None:
    apply = APPLY[len(scene.objects)]
    faults = {
        "shape": (with_first(scene, shape="triangle"),
                  {"single_object", "two_objects", "position", "colour_attribution"}),
        "colour": (with_first(scene, colour="cyan"), {"colours", "colour_attribution"}),
        "size": (with_first(scene, size="small"), set()),
        "place": (with_first(scene, place="bottom right"), {"position"}),
        "background": (replace(scene, background="black"), set()),
        "missing": (replace(scene, objects=scene.objects[1:]), apply),
        "surplus": (
            replace(scene, objects=(*scene.objects, Object("star", "yellow", "small", "bottom right"))),
            {"counting"},
        ),
    }  # fmt: skip
    for name, (shown, categories) in faults.items():
        assert wrong(scene, shown) == (categories & apply) | {"scene"}, name


def test_swapped_colours_and_places_are_told_from_missing_ones() -> None:
    colours = replace(TWO, objects=(replace(CIRCLE, colour="green"), replace(SQUARE, colour="red")))
    assert wrong(TWO, colours) == {"scene", "colour_attribution"}
    places = replace(TWO, objects=(replace(CIRCLE, place="top right"), replace(SQUARE, place="top left")))
    assert wrong(TWO, places) == {"scene", "position"}


def test_what_is_wanted_twice_must_be_there_twice() -> None:
    twins = Scene("white", (CIRCLE, replace(CIRCLE, place="top right")))
    expected = {"scene", "two_objects", "colours", "position", "colour_attribution"}
    assert wrong(twins, Scene("white", (CIRCLE, replace(SQUARE, colour="blue")))) == expected
    assert wrong(twins, twins) == set()


def test_what_is_unclear_is_not_right() -> None:
    half = render(ONE, *SIZE)
    half[28:] = half[0, 0]  # the upper half of the circle is no shape of the world
    assert failed(score_picture(ONE, half)) == {"scene", "single_object", "position"}
    noise = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    assert failed(score_picture(THREE, noise)) >= {"scene", "colours", "position", "colour_attribution"}


@pytest.mark.parametrize("damage", [kept, blurred, compressed])
def test_a_true_edit_is_right_and_the_source_is_only_untouched(
    damage: Callable[[np.ndarray], np.ndarray],
) -> None:
    random = np.random.default_rng(1)
    kinds = set()
    for index in range(30):
        source = draw_scene(6, index, split=("train", "compositional")[index % 2])
        every = [draw_edit(source, kind, random) for kind in get_args(EditKind)]
        possible = [edit for edit in every if edit is not None]
        edit = possible[index % len(possible)]
        kinds.add(edit.kind)
        scores = score_edit(source, edit.scene, damage(render(edit.scene, *SIZE)))
        assert scores == {"edit": True, "followed": True, "untouched": True}, edit.instruction
        scores = score_edit(source, edit.scene, damage(render(source, *SIZE)))
        assert scores == {"edit": False, "followed": False, "untouched": True}, edit.instruction
    assert kinds == {"recolour", "remove", "add", "move"}


def edit_of(instruction: str) -> Edit:
    (edit,) = (edit for edit in edits(THREE) if edit.instruction == instruction)
    return edit


RECOLOUR = edit_of("change the color of the large red circle at the top left to yellow")
REMOVE = edit_of("remove the large red circle at the top left")
ADD = edit_of("add a small cyan star at the bottom right")
MOVE = edit_of("move the large red circle at the top left to the bottom right")


@pytest.mark.parametrize("edit", [RECOLOUR, REMOVE, ADD, MOVE], ids=lambda edit: edit.kind)
def test_a_fault_beside_the_edit_fails_untouched_alone(edit: Edit) -> None:
    others = tuple(thing for thing in edit.scene.objects if thing != STAR)
    for change in ({"shape": "circle"}, {"colour": "red"}, {"size": "small"}):
        shown = replace(edit.scene, objects=(*others, replace(STAR, **change)))
        assert failed(score_edit(THREE, edit.scene, render(shown, *SIZE))) == {"edit", "untouched"}
    missing = replace(edit.scene, objects=others)
    assert failed(score_edit(THREE, edit.scene, render(missing, *SIZE))) == {"edit", "untouched"}
    (other,) = set(BACKGROUNDS) - {edit.scene.background}
    night = replace(edit.scene, background=other)
    assert failed(score_edit(THREE, edit.scene, render(night, *SIZE))) == {"edit", "untouched"}


@pytest.mark.parametrize(
    ("edit", "shown", "expected"),
    [
        (RECOLOUR, replace(CIRCLE, colour="orange"), {"edit", "followed"}),
        (RECOLOUR, replace(CIRCLE, colour="yellow", shape="square"), {"edit", "followed"}),
        (RECOLOUR, replace(CIRCLE, colour="yellow", size="small"), {"edit"}),
        (RECOLOUR, replace(CIRCLE, colour="yellow", place="bottom right"), {"edit", "followed", "untouched"}),
        (REMOVE, replace(CIRCLE, size="small"), {"edit", "followed"}),
        (REMOVE, replace(CIRCLE, place="bottom right"), {"edit", "untouched"}),
        (ADD, Object("circle", "cyan", "small", "bottom right"), {"edit", "followed"}),
        (ADD, Object("star", "red", "small", "bottom right"), {"edit", "followed"}),
        (ADD, Object("star", "cyan", "large", "bottom right"), {"edit", "followed"}),
        (MOVE, replace(CIRCLE, place="bottom right", size="small"), {"edit", "followed"}),
        (MOVE, replace(CIRCLE, place="bottom right", colour="blue"), {"edit", "followed"}),
        (MOVE, replace(CIRCLE, place="bottom right", shape="star"), {"edit", "followed"}),
    ],
)  # fmt: skip
def test_an_edit_done_otherwise(edit: Edit, shown: Object, expected: set[str]) -> None:
    things = (SQUARE, STAR, *((CIRCLE,) if edit is ADD else ()), shown)
    assert failed(score_edit(THREE, edit.scene, render(Scene("white", things), *SIZE))) == expected


def test_half_a_move_is_none() -> None:
    copied = replace(THREE, objects=(*THREE.objects, replace(CIRCLE, place="bottom right")))
    assert failed(score_edit(THREE, MOVE.scene, render(copied, *SIZE))) == {"edit", "followed"}
    assert failed(score_edit(THREE, MOVE.scene, render(REMOVE.scene, *SIZE))) == {"edit", "followed"}


def test_a_thing_between_the_places_fails_both() -> None:
    """Shifted, the circle is neither gone nor a kept object: whether it was removed cannot be said."""
    alone = Scene("white", (CIRCLE,))
    shifted = np.roll(render(alone, *SIZE), 28, axis=1)
    empty = Scene("white", ())
    assert failed(score_edit(alone, empty, shifted)) == {"edit", "followed", "untouched"}
    assert score_edit(alone, empty, render(empty, *SIZE)) == dict.fromkeys(
        ("edit", "followed", "untouched"), True
    )


@pytest.mark.parametrize(
    ("source", "wanted"), [(THREE, THREE), (THREE, ONE), (THREE, replace(THREE, background="black"))]
)
def test_scenes_that_are_no_edit_apart_are_refused(source: Scene, wanted: Scene) -> None:
    with pytest.raises(ValueError, match="no edit leads from"):
        score_edit(source, wanted, render(wanted, *SIZE))


def test_other_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="float32 of shape"):
        score_picture(ONE, np.zeros((112, 112, 3), np.float32))
