"""The checker reads the world's pictures back, tells wrong scenes apart and never guesses."""

import io
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from illume_lightning.data.worlds.shapes import COLOURS, SHAPES, SPLITS, Object, Scene, draw_scene, render
from illume_lightning.data.worlds.shapes_checker import Reading, Seen, compare, read_scene

SIZES = [(112, 112), (80, 160), (128, 80), (160, 160)]
LONG = [(64, 224), (208, 64)]  # 1:4 and 3:1 near 112 pixels
SCENE = Scene(
    "white",
    (
        Object("circle", "red", "large", "top left"),
        Object("square", "green", "small", "top right"),
        Object("star", "blue", "large", "bottom left"),
    ),
)


def blurred(pixels: np.ndarray, sigma: float) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(sigma)))


def compressed(pixels: np.ndarray) -> np.ndarray:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG", quality=30)
    return np.asarray(Image.open(data))


@lru_cache
def held_out(count: int) -> list[Scene]:
    """Scenes of the splits that are judged by, from both in turn."""
    return [draw_scene(7, index, split=SPLITS[2 + index % 2], min_objects=0) for index in range(count)]


def exact(size: tuple[int, int], count: int, damage: Callable[[np.ndarray], np.ndarray]) -> float:
    """Share of held-out scenes that are read exactly."""
    scenes = held_out(count)
    return float(np.mean([read_scene(damage(render(scene, *size))).scene == scene for scene in scenes]))


def verdict_of(scene: Scene) -> tuple[tuple[str, ...], int]:
    """What fails, and how many objects are right, if a picture shows `scene` instead of `SCENE`."""
    verdict = compare(read_scene(render(scene, 112, 112)), SCENE)
    return verdict.failed, verdict.right


def with_last(**changes: str) -> Scene:
    *others, last = SCENE.objects
    return replace(SCENE, objects=(*others, replace(last, **changes)))


@pytest.mark.parametrize("size", SIZES)
def test_clean_pictures_are_read_exactly(size: tuple[int, int]) -> None:
    assert exact(size, 200, lambda pixels: pixels) >= 0.995


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 2**64 - 1), st.sampled_from(SPLITS), st.integers(48, 256), st.integers(48, 256))
def test_any_scene_is_read_at_any_size(seed: int, split: str, height: int, width: int) -> None:
    scene = draw_scene(seed, 0, split=split, min_objects=0)
    assert read_scene(render(scene, height, width)).scene == scene


@pytest.mark.parametrize("size", SIZES + LONG)
@pytest.mark.parametrize(
    "damage",
    [lambda pixels: blurred(pixels, 1), lambda pixels: blurred(pixels, 2), compressed],
    ids=["blur 1", "blur 2", "JPEG 30"],
)
def test_damaged_pictures_are_read(size: tuple[int, int], damage: Callable[[np.ndarray], np.ndarray]) -> None:
    assert exact(size, 100, damage) >= 0.97


@pytest.mark.parametrize("size", SIZES)
def test_blurred_and_compressed_pictures_are_read(size: tuple[int, int]) -> None:
    assert exact(size, 100, lambda pixels: compressed(blurred(pixels, 2))) >= 0.97


@pytest.mark.parametrize(
    ("scene", "failed"),
    [
        (SCENE, ()),
        (with_last(colour="cyan"), ("colours",)),
        (with_last(shape="triangle"), ("shapes",)),
        (with_last(size="small"), ("sizes",)),
        (with_last(place="bottom right"), ("places",)),
        (replace(SCENE, background="black"), ("background",)),
    ],
    ids=["same", "colour", "shape", "size", "place", "background"],
)
def test_one_change_fails_one_category(scene: Scene, failed: tuple[str, ...]) -> None:
    right = 2 if failed and failed != ("background",) else 3
    assert verdict_of(scene) == (failed, right)


def test_each_change_of_drawn_scenes_fails_its_category() -> None:
    for index in range(40):
        wanted = draw_scene(3, index, split="test", max_objects=3)
        first, *others = wanted.objects
        taken = {thing.place for thing in wanted.objects}
        changes = {
            "colours": {"colour": next(name for name in COLOURS if name != first.colour)},
            "shapes": {"shape": next(name for name in SHAPES if name != first.shape)},
            "sizes": {"size": "large" if first.size == "small" else "small"},
            "places": {"place": "top left" if "top left" not in taken else "bottom right"},
        }
        if changes["places"]["place"] in taken:
            del changes["places"]
        for category, change in changes.items():
            wrong = Scene(wanted.background, (replace(first, **change), *others))
            verdict = compare(read_scene(render(wrong, 112, 112)), wanted)
            assert verdict.failed == (category,)
            assert verdict.right == len(others)


def test_missing_and_surplus_objects() -> None:
    missing = replace(SCENE, objects=SCENE.objects[:2])
    assert verdict_of(missing) == (("count", "colours", "shapes", "sizes", "places"), 2)
    surplus = replace(SCENE, objects=(*SCENE.objects, Object("star", "red", "small", "bottom right")))
    assert verdict_of(surplus) == (("count",), 3)
    assert compare(read_scene(render(surplus, 112, 112)), SCENE).found == 4


def test_swapped_colours_are_wrong() -> None:
    circle, square, star = SCENE.objects
    swapped = (replace(circle, colour="green"), replace(square, colour="red"), star)
    assert verdict_of(replace(SCENE, objects=swapped)) == (("colours",), 1)


@pytest.mark.parametrize("background", ["white", "black"])
def test_blank_picture_is_an_empty_scene(background: str) -> None:
    empty = Scene(background, ())
    reading = read_scene(render(empty, 80, 112))
    assert reading == Reading(background, ())
    assert reading.scene == empty
    assert compare(reading, empty).exact
    verdict = compare(reading, SCENE)
    assert (verdict.right, verdict.found, verdict.wanted) == (0, 0, 3)


def test_what_is_no_object_is_unclear() -> None:
    disk = render(Scene("white", (Object("circle", "red", "large", "top left"),)), 112, 112)
    half, ring, grey, mixed = (disk.copy() for _ in range(4))
    shifted = np.roll(disk, 28, axis=1)
    mixed[28:][(disk[28:] == COLOURS["red"]).all(axis=2)] = COLOURS["orange"]
    half[28:] = disk[0, 0]
    ring[18:38, 18:38] = disk[0, 0]
    grey[(disk == COLOURS["red"]).all(axis=2)] = 128
    cases = [
        (half, Seen(None, "red", None, "top left")),
        (ring, Seen(None, "red", None, "top left")),
        (grey, Seen("circle", None, "large", "top left")),
        (shifted, Seen("circle", "red", "large", None)),
    ]
    assert [part.colour for part in read_scene(mixed).parts] == [None]
    for picture, seen in cases:
        reading = read_scene(picture)
        assert reading == Reading("white", (seen,))
        assert reading.scene is None
        assert seen.object is None
    between = np.asarray(Image.fromarray(disk[:56, :56]).resize((48, 48), Image.Resampling.BICUBIC))
    middling = np.full_like(disk, 245)
    middling[4:52, 4:52] = between  # a radius of 0.36 of the cell: neither small nor large
    assert read_scene(middling).parts == (Seen("circle", "red", None, "top left"),)


def test_unknown_background_is_unclear_and_objects_are_still_read() -> None:
    disk = render(Scene("white", (Object("circle", "red", "large", "top left"),)), 112, 112)
    disk[(disk == 245).all(axis=2)] = 128
    reading = read_scene(disk)
    assert reading == Reading(None, (Seen("circle", "red", "large", "top left"),))
    assert reading.scene is None


def test_two_parts_in_one_place_are_no_scene() -> None:
    seen = Seen("circle", "red", "small", "top left")
    assert Reading("white", (seen, seen)).scene is None
    wanted = Scene("white", (Object("circle", "red", "small", "top left"),))
    verdict = compare(Reading("white", (seen, seen)), wanted)
    assert (verdict.failed, verdict.right) == (("count",), 1)


def test_noise_and_photographs_are_no_scenes() -> None:
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (112, 112, 3), dtype=np.uint8)
    soft = blurred(random.integers(0, 256, (160, 80, 3), dtype=np.uint8), 3)
    spots = np.where(random.random((112, 112, 1)) < 0.5, 20, 245).astype(np.uint8).repeat(3, axis=2)
    for picture in (noise, soft, spots):
        reading = read_scene(picture)
        assert reading.scene is None
        verdict = compare(reading, SCENE)
        assert (verdict.exact, verdict.right) == (False, 0)
    samples = pytest.importorskip("sklearn.datasets")
    for name in ("china.jpg", "flower.jpg"):
        photograph = np.asarray(Image.fromarray(samples.load_sample_image(name)).resize((160, 112)))
        reading = read_scene(photograph)
        assert reading.scene is None
        assert not compare(reading, SCENE).exact


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((112, 112, 3), np.float32), "float32 of shape"),
        (np.zeros((3, 112, 112), np.uint8), r"\(3, 112, 112\); it must be RGB"),
        (np.zeros((112, 15, 3), np.uint8), "112x15; each side must have at least 16"),
    ],
)
def test_other_pictures_are_refused(picture: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_scene(picture)
