"""Shapes: scenes are what they say, pictures show them on any canvas, splits never share a scene."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from illume_lightning.data.image import decode
from illume_lightning.data.store import ImageStore
from illume_lightning.data.worlds.prepare_shapes import picture_sizes, prepare_shapes
from illume_lightning.data.worlds.shapes import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    RADII,
    SEEN_PAIRS,
    SHAPES,
    SPLITS,
    UNSEEN_PAIRS,
    Object,
    Scene,
    appearance,
    caption,
    draw_scene,
    object_masks,
    pairs_of,
    phrase,
    render,
    split_of,
)
from illume_lightning.resolution import ratio_sizes

FULL = Scene(
    "black",
    (
        Object("circle", "red", "large", "top left"),
        Object("square", "cyan", "small", "top right"),
        Object("triangle", "yellow", "large", "bottom left"),
        Object("star", "purple", "small", "bottom right"),
    ),
)
CANVASES = [(224, 224), (112, 336), (480, 160), (181, 333), (16, 16)]


def one(shape: str, size: str = "large", place: str = "top left") -> Scene:
    return Scene("white", (Object(shape, "blue", size, place),))


@pytest.mark.parametrize(("height", "width"), CANVASES)
def test_render_shows_each_object_in_its_cell(height: int, width: int) -> None:
    pixels = render(FULL, height, width)
    assert pixels.shape == (height, width, 3)
    assert pixels.dtype == np.uint8
    for thing in FULL.objects:
        row, column = divmod(PLACES.index(thing.place), 2)
        centre = pixels[(2 * row + 1) * height // 4, (2 * column + 1) * width // 4]
        assert centre.tolist() == list(COLOURS[thing.colour])
        corner = pixels[-row, -column]  # the cell's corner that is a corner of the canvas
        assert corner.tolist() == list(BACKGROUNDS["black"])


@pytest.mark.parametrize("size", RADII)
@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("circle", np.pi),
        ("square", np.pi),
        ("triangle", 1.15**2 * 3**1.5 / 4),
        ("star", 5 * 1.1 * 0.5 * np.sin(np.pi / 5)),
    ],
)
def test_areas_are_exact_by_anti_aliasing(shape: str, area: float, size: str) -> None:
    for height, width in ((224, 224), (111, 300), (300, 111)):
        radius = RADII[size] * min(height, width) / 2
        mask = object_masks(one(shape, size), height, width)[0]
        assert mask.sum() == pytest.approx(area * radius**2, rel=0.01)
        assert ((mask > 0) & (mask < 1)).any()


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_lie_in_the_middle_and_keep_to_their_cell(shape: str) -> None:
    for height, width in CANVASES[:4]:
        for place in PLACES:
            mask = object_masks(one(shape, "large", place), height, width)[0]
            row, column = divmod(PLACES.index(place), 2)
            rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
            assert (rows[0] + rows[-1] + 1) / 2 == pytest.approx(
                (2 * row + 1) * height / 4, abs=0.06 * min(height, width)
            )
            assert (columns[0] + columns[-1] + 1) / 2 == pytest.approx((2 * column + 1) * width / 4, abs=1)
            assert rows[0] > row * height // 2
            assert rows[-1] < (row + 1) * height // 2 - 1
            assert columns[0] > column * width // 2
            assert columns[-1] < (column + 1) * width // 2 - 1


def test_shapes_have_their_corners() -> None:
    masks = {shape: object_masks(one(shape), 224, 224)[0][:112, :112] > 0.5 for shape in SHAPES}
    rows = {shape: mask.sum(1)[mask.any(1)] for shape, mask in masks.items()}
    assert len(set(rows["square"].tolist())) == 1
    assert (np.diff(rows["triangle"]) >= 0).all()  # wider towards the bottom
    widest = np.flatnonzero(rows["circle"] == rows["circle"].max())
    assert (widest.mean() + 0.5) * 2 == len(rows["circle"])
    assert all((mask == mask[:, ::-1]).all() for mask in masks.values())
    bottom = masks["star"][masks["star"].any(1)][-3]
    assert np.diff(bottom.astype(int)).clip(0).sum() == 2  # two feet


def test_masks_explain_the_picture() -> None:
    masks = object_masks(FULL, 150, 210)
    assert masks.shape == (4, 150, 210)
    assert masks.dtype == np.float32
    assert masks.sum(0).max() <= 1
    colours = np.array([COLOURS[thing.colour] for thing in FULL.objects])
    expected = np.tensordot(masks, colours, (0, 0)) + (1 - masks.sum(0))[..., None] * 20
    assert np.abs(render(FULL, 150, 210) - expected).max() <= 0.51
    assert object_masks(Scene("white", ()), 20, 30).shape == (0, 20, 30)


def test_words() -> None:
    assert appearance(FULL.objects[3]) == "a small purple star"
    assert phrase(FULL.objects[3]) == "a small purple star at the bottom right"
    assert caption(FULL) == (
        "a large red circle at the top left, a small cyan square at the top right, "
        "a large yellow triangle at the bottom left and a small purple star at the bottom right "
        "on a black background"
    )
    assert caption(one("star")) == "a large blue star at the top left on a white background"
    assert caption(Scene("white", ())) == "nothing on a white background"


def test_json_round_trip_and_reading_order() -> None:
    for index in range(50):
        scene = draw_scene(3, index)
        assert Scene.from_json(scene.to_json()) == scene
        assert Scene.from_dict(json.loads(json.dumps(asdict(scene)))) == scene
    shuffled = Scene("black", FULL.objects[::-1])
    assert shuffled == FULL
    assert shuffled.to_json() == FULL.to_json()


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown colour 'pink'; known are red"):
        Object("star", "pink", "large", "top left")
    with pytest.raises(ValueError, match="unknown background 'grey'"):
        Scene("grey", ())
    with pytest.raises(ValueError, match="share a place: top left, top left"):
        Scene("white", one("star").objects + one("circle").objects)


def test_scenes_are_a_function_of_seed_and_index() -> None:
    scenes = [draw_scene(0, index) for index in range(200)]
    assert scenes[::-1] == [draw_scene(0, index) for index in reversed(range(200))]
    assert scenes[7] == Scene.from_json(
        '{"background":"black","objects":['
        '{"colour":"blue","place":"top left","shape":"circle","size":"large"},'
        '{"colour":"cyan","place":"top right","shape":"triangle","size":"large"},'
        '{"colour":"orange","place":"bottom left","shape":"circle","size":"small"},'
        '{"colour":"purple","place":"bottom right","shape":"star","size":"large"}]}'
    )
    assert sum(a == draw_scene(1, i) for i, a in enumerate(scenes)) < 3
    counts = np.bincount([len(scene.objects) for scene in scenes], minlength=5)
    assert counts[0] == 0
    assert counts[1:].min() > 25
    things = [thing for scene in scenes for thing in scene.objects]
    for name, known in (("shape", SHAPES), ("colour", COLOURS), ("size", RADII), ("place", PLACES)):
        shares = [sum(getattr(thing, name) == value for thing in things) / len(things) for value in known]
        assert min(shares) > 0.6 / len(known)
        assert max(shares) < 1.5 / len(known)
    assert {len(draw_scene(0, i, min_objects=2, max_objects=3).objects) for i in range(30)} == {2, 3}


def test_splits_never_share_a_scene() -> None:
    # One object: 448 scenes in all, so that a leak could not hide.
    drawn = {
        split: {draw_scene(seed, i, split=split, max_objects=1) for seed in (0, 1) for i in range(400)}
        for split in SPLITS
    }
    assert len(set().union(*drawn.values())) == sum(map(len, drawn.values()))
    assert all(split_of(scene) == split for split, scenes in drawn.items() for scene in scenes)
    every = [
        Scene(background, (Object(shape, colour, size, place),))
        for background in BACKGROUNDS for shape in SHAPES for colour in COLOURS
        for size in RADII for place in PLACES
    ]  # fmt: skip
    assert drawn["compositional"] == {scene for scene in every if not scene.pairs.isdisjoint(UNSEEN_PAIRS)}
    seen = [scene for scene in every if scene not in drawn["compositional"]]
    shares = {split: sum(split_of(scene) == split for scene in seen) / len(seen) for split in SPLITS[:3]}
    assert shares["train"] == pytest.approx(0.9, abs=0.04)
    assert shares["val"] == pytest.approx(0.05, abs=0.03)
    assert shares["test"] == pytest.approx(0.05, abs=0.03)


def test_unseen_pairs_are_in_the_compositional_split_alone() -> None:
    assert sorted(shape for _, shape in UNSEEN_PAIRS) == sorted(SHAPES)
    assert len({colour for colour, _ in UNSEEN_PAIRS}) == len(UNSEEN_PAIRS) == 4
    assert set(pairs_of("train")) == set(SEEN_PAIRS)
    assert len(SEEN_PAIRS) == 24
    for split in SPLITS:
        scenes = [draw_scene(2, index, split=split) for index in range(300)]
        assert set().union(*(scene.pairs for scene in scenes)) == set(pairs_of(split))
        assert all(scene.pairs.isdisjoint(UNSEEN_PAIRS) == (split != "compositional") for scene in scenes)
        counts = np.bincount([len(scene.objects) for scene in scenes], minlength=5)
        assert counts[0] == 0
        assert counts[1:].min() > 50  # whatever the split, all numbers of objects are as likely
        if split == "compositional":
            things = [thing for scene in scenes for thing in scene.objects]
            unseen = [thing.place for thing in things if (thing.colour, thing.shape) in UNSEEN_PAIRS]
            assert 0.4 < len(unseen) / len(things) < 0.6
            assert min(map(unseen.count, PLACES)) > 0.15 * len(unseen)


def test_prepare(tmp_path) -> None:
    sizes = [(64, 64), (48, 96)]
    manifest = prepare_shapes(tmp_path / "a", count=60, seed=5, split="val", sizes=sizes)[""]
    store = ImageStore(tmp_path / "a")
    assert len(store) == manifest.written == 60
    assert manifest.converted == {}
    assert manifest.dropped == {}
    assert {tuple(size) for size in store.sizes.tolist()} == set(sizes)
    for index in range(60):
        record, scene = store.read(index), draw_scene(5, index, split="val")
        assert record.caption == caption(scene)
        assert Scene.from_json(record.meta) == scene
        for thing, (words, top, left, bottom, right) in zip(
            scene.objects, json.loads(record.meta)["regions"], strict=True
        ):
            row, column = divmod(PLACES.index(thing.place), 2)
            assert words == appearance(thing)
            assert (top, left, bottom, right) == (row / 2, column / 2, (row + 1) / 2, (column + 1) / 2)
        assert (decode(record.image) == render(scene, *store.sizes[index].tolist())).all()
    prepare_shapes(tmp_path / "b", count=40, seed=5, split="val", sizes=sizes)
    shorter = ImageStore(tmp_path / "b")
    assert [shorter.read(i) for i in range(40)] == [store.read(i) for i in range(40)]  # more only adds


def test_pictures_of_the_eleven_ratios(tmp_path) -> None:
    assert picture_sizes(None, None) == ((224, 224),)
    assert picture_sizes([(32, 48)], None) == ((32, 48),)
    expected = ratio_sizes(64)
    drawn = picture_sizes(None, 64)
    assert drawn.count((64, 64)) == len(drawn) / 2
    assert set(drawn) == set(expected)
    prepare_shapes(tmp_path / "ratios", count=200, ratios=64)
    sizes = [tuple(size) for size in ImageStore(tmp_path / "ratios").sizes.tolist()]
    assert set(sizes) == set(expected)
    assert 0.4 < sizes.count((64, 64)) / 200 < 0.6


def test_pictures_of_all_pairs_are_another_store(tmp_path) -> None:
    """A store from before there were unseen pairs is not taken for one without them."""
    options: dict = {"count": 3, "sizes": [(16, 16)]}
    manifest = prepare_shapes(tmp_path / "a", **options)[""]
    assert manifest.identity["unseen_pairs"] == [list(pair) for pair in UNSEEN_PAIRS]
    content = json.loads((tmp_path / "a" / "manifest.json").read_text())
    del content["identity"]["unseen_pairs"]
    (tmp_path / "a" / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"with other options \(unseen_pairs was None"):
        prepare_shapes(tmp_path / "a", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"split": "dev"}, "split is 'dev'; it must be one of train, val, test, compositional"),
        ({"max_objects": 5}, "max_objects=5"),
        ({"min_objects": 3, "max_objects": 2}, "min_objects=3"),
        ({"sizes": []}, "give at least one"),
        ({"sizes": [(224, 8)]}, "224, 8"),
        ({"sizes": [(224, 224)], "ratios": 112}, "sizes is .* and ratios is 112; give one of them"),
        ({"ratios": 8}, "side 8: the smallest picture"),
    ],
)
def test_options_out_of_range(tmp_path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_shapes(tmp_path / "out", **{"count": 4, **options})
    assert list(tmp_path.iterdir()) == []
