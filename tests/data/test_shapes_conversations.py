"""Conversations about shapes: answers are true, edits do what they say, splits share no scene."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from illume_lightning.data.conversation import IMAGE, Conversation, Turn
from illume_lightning.data.conversation_store import ConversationStore
from illume_lightning.data.image import decode
from illume_lightning.data.store import Manifest
from illume_lightning.data.text_tokenizer import TextTokenizer
from illume_lightning.data.worlds.conversations import WorldTask
from illume_lightning.data.worlds.shapes import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    RADII,
    SHAPES,
    SPLITS,
    UNSEEN_PAIRS,
    Object,
    Scene,
    caption,
    draw_scene,
    phrase,
    render,
    split_of,
)  # fmt: skip
from illume_lightning.data.worlds.shapes_conversations import (
    ConversationsPart,
    SceneOptions,
    draw_example,
    prepare_shapes_conversations,
    prepare_shapes_tokenizer,
)  # fmt: skip
from illume_lightning.data.worlds.shapes_edits import EditKind, draw_edit, edits
from illume_lightning.data.worlds.shapes_questions import Question, informative, questions
from illume_lightning.data.worlds.shapes_tasks import prepare_shapes_tasks

TASKS: tuple[WorldTask, ...] = get_args(WorldTask)
SCENES = [
    *(draw_scene(3, index) for index in range(40)),
    *(draw_scene(3, index, split="compositional") for index in range(20)),
    Scene("white", ()),
    Scene("black", ()),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer") / "shapes"
    prepare_shapes_tokenizer(folder)
    return TextTokenizer(folder)


def by_hand(scene: Scene, question: Question) -> str:
    """The answer, from the words of the question alone."""
    text = question.text
    found = re.fullmatch(r"Is there an? (\w+) (\w+)\?", text)
    if found:
        return "yes" if found.groups() in [(thing.colour, thing.shape) for thing in scene.objects] else "no"
    found = re.fullmatch(r"What (?:is|color is the object|shape is the object) at the (\w+ \w+)\?", text)
    if found:
        things = [thing for thing in scene.objects if thing.place == found[1]]
        if not things:
            return "nothing"
        if "color" in text:
            return things[0].colour
        if "shape" in text:
            return things[0].shape
        return phrase(things[0]).split(" at ")[0]
    return {
        "Describe the image.": caption(scene),
        "How many objects are there?": str(len(scene.objects)),
        "What color is the background?": scene.background,
    }[text]


@pytest.mark.parametrize("scene", SCENES, ids=caption)
def test_answers_are_true(scene: Scene) -> None:
    asked = questions(scene, np.random.default_rng(0))
    assert Counter(question.kind for question in asked) == Counter(
        {
            "caption": 1, "count": 1, "background": 1, "existence": 1 + (len(scene.pairs) > 1), "content": 4,
            "colour": len(scene.objects), "shape": len(scene.objects),
        }
    )  # fmt: skip
    assert len({question.text for question in asked}) == 8 + (len(scene.pairs) > 1) + 2 * len(scene.objects)
    for question in asked:
        assert question.answer == by_hand(scene, question), question


def test_questions_come_in_any_order_and_reproduce() -> None:
    asked = [questions(SCENES[0], np.random.default_rng(seed)) for seed in range(40)]
    assert questions(SCENES[0], np.random.default_rng(7)) == asked[7]
    assert len({each[0].text for each in asked}) >= 6
    assert {"caption", "existence"} <= {each[0].kind for each in asked}


def test_existence_is_balanced_and_cannot_be_guessed_from_the_colours() -> None:
    random = np.random.default_rng(0)
    answers, near = [], []
    for index in range(600):
        scene = draw_scene(0, index)
        for question in (each for each in questions(scene, random) if each.kind == "existence"):
            answers.append(question.answer == "yes")
            words = question.text.rstrip("?").split()
            near.append(any(thing.colour in words or thing.shape in words for thing in scene.objects))
    assert 0.44 < np.mean(answers) < 0.56
    assert all(near)


@pytest.mark.parametrize("scene", SCENES, ids=caption)
def test_edits_change_what_they_say(scene: Scene) -> None:
    found = list(edits(scene))
    things, free = len(scene.objects), 4 - len(scene.objects)
    assert Counter(edit.kind for edit in found) == +Counter(
        {"remove": things, "recolour": 6 * things, "move": free * things, "add": 56 * free}
    )
    assert len({edit.instruction for edit in found}) == len({edit.scene for edit in found}) == len(found)
    for edit in found:
        assert edit.scene != scene
        assert edit.scene == obey(scene, edit.instruction)


def obey(scene: Scene, instruction: str) -> Scene:
    """The scene after an instruction, from its words alone."""
    thing = r"(\w+) (\w+) (\w+) at the (\w+ \w+)"
    pattern = rf"(?:(remove)|change the color of|(move)|(add)) (?:the|a) {thing}(?: to (?:the )?(.+))?"
    remove, move, add, size, colour, shape, place, to = re.fullmatch(pattern, instruction).groups()
    named = Object(shape, colour, size, place)
    if add:
        return Scene(scene.background, (*scene.objects, named))
    assert named in scene.objects
    others = tuple(other for other in scene.objects if other != named)
    if remove:
        return Scene(scene.background, others)
    changed = Object(shape, colour, size, to) if move else Object(shape, to, size, place)
    return Scene(scene.background, (*others, changed))


def test_a_drawn_edit_is_of_its_kind_and_stays_in_the_split() -> None:
    random = np.random.default_rng(0)
    for split in SPLITS:
        for index in range(40):
            scene = draw_scene(0, index, split=split)
            for kind in get_args(EditKind):
                edit = draw_edit(scene, kind, random)
                if edit is None:
                    assert all(split_of(each.scene) != split for each in edits(scene) if each.kind == kind)
                else:
                    assert edit.kind == kind and split_of(edit.scene) == split


@pytest.mark.parametrize("split", SPLITS)
def test_kinds_of_edits_are_equally_likely_in_every_split(split: str) -> None:
    """By the binomial's bounds: 80 at one quarter stay within 4 standard deviations of 20."""
    kinds = Counter(draw_example("editing", SceneOptions(split=split), index).edit for index in range(80))
    assert len(kinds) == 4 and max(abs(count - 20) for count in kinds.values()) <= 15
    full = SceneOptions(split=split, min_objects=4)  # nowhere to put or to move anything
    assert {draw_example("editing", full, index).edit for index in range(8)} == {"recolour", "remove"}


def test_all_tasks_and_splits_at_once(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    options = {
        "tokenizer": str(tokenizer.folder),
        "held_out": 3,
        "sizes": [(48, 48)],
        "one_object_share": 1.0,
    }
    made = prepare_shapes_tasks(tmp_path, train={"editing": 5, "text": 4}, **options)
    assert {name: manifest.written for name, manifest in made.items()} == {
        f"{task}/{split}": (5 if task == "editing" else 4) if split == "train" else 3
        for task in ("editing", "text")
        for split in SPLITS
    }
    store = ConversationStore(tmp_path / "editing" / "train")
    scenes = [json.loads(store.read(index).meta)["scenes"][0] for index in range(5)]
    assert all(len(scene["objects"]) == 1 for scene in scenes)
    with pytest.raises(ValueError, match="train names no task"):
        prepare_shapes_tasks(tmp_path, train={}, **options)
    with pytest.raises(ValueError, match="task is 'edit'"):
        prepare_shapes_tasks(tmp_path, train={"edit": 1}, **options)


def pairs_in(texts: list[str]) -> set[tuple[str, str]]:
    """Colours and shapes that texts name together."""
    named = re.findall(rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})", "\n".join(texts))
    return set(named)


@pytest.mark.parametrize("task", TASKS)
def test_unseen_pairs_are_named_in_the_compositional_split_alone(task: WorldTask) -> None:
    for split in SPLITS:
        examples = [
            draw_example(task, SceneOptions(seed, split), index) for seed in (0, 1) for index in range(60)
        ]
        shown = set().union(*(scene.pairs for example in examples for scene in example.scenes))
        named = pairs_in([turn.text for example in examples for turn in example.conversation.turns])
        assert bool(named) == (task != "reconstruction")
        if split == "compositional":
            assert named >= set(UNSEEN_PAIRS) or task == "reconstruction"
        else:
            assert (named | shown).isdisjoint(UNSEEN_PAIRS)


def test_existence_is_asked_of_all_pairs_that_a_split_may_have() -> None:
    random = np.random.default_rng(0)
    for split, most in (("train", 24), ("compositional", 28)):
        scenes = [draw_scene(1, index, split=split) for index in range(500)]
        asked = [each for scene in scenes for each in questions(scene, random) if each.kind == "existence"]
        for answer in ("yes", "no"):
            assert len(pairs_in([each.text for each in asked if each.answer == answer])) == most


@pytest.mark.parametrize("task", TASKS)
def test_examples_reproduce_and_keep_to_their_split(task: WorldTask) -> None:
    for split in SPLITS:
        options = SceneOptions(seed=5, split=split)
        examples = [draw_example(task, options, index) for index in range(30)]
        assert examples == [draw_example(task, options, index) for index in range(30)]
        assert {split_of(scene) for example in examples for scene in example.scenes} <= {split}
        assert len({example.conversation for example in examples}) > (0 if task == "reconstruction" else 20)
        for example in examples:
            turns = [turn.role for turn in example.conversation.turns]
            assert len(example.scenes) == len(example.conversation.is_target)
            assert len(example.kinds) == turns.count("assistant")
    other = [draw_example(task, SceneOptions(seed=6), index) for index in range(30)]
    assert other != [draw_example(task, SceneOptions(seed=5), index) for index in range(30)]


def test_conversations_of_each_task() -> None:
    found = {task: draw_example(task, SceneOptions(), 5) for task in TASKS}
    first = {task: example.conversation.turns for task, example in found.items()}
    scene = found["captioning"].scenes[0]
    assert {task: example.conversation.task for task, example in found.items()} == {
        "reconstruction": "editing", "captioning": "understanding", "generation": "generation",
        "understanding": "understanding", "editing": "editing", "text": "text",
    }  # fmt: skip
    assert {example.scenes[0] for example in found.values() if example.scenes} == {scene}
    assert found["reconstruction"].scenes == (scene, scene)
    assert first["captioning"] == (
        Turn("user", "<image>\nDescribe the image."),
        Turn("assistant", caption(scene)),
    )
    assert first["generation"][0].text == (
        f"Generate an image of {{resolution_tag}}, the content of image is {caption(scene)}\n"
    )
    source, target = found["editing"].scenes
    instruction = re.fullmatch(
        r"<image>\nPlease edit the image according to the instruction: (.*)\.\n", first["editing"][0].text
    )[1]
    assert obey(source, instruction) == target
    assert [first[task][1] for task in ("reconstruction", "generation", "editing")] == [
        Turn("assistant", IMAGE)
    ] * 3
    kinds = {task: found[task].kinds for task in ("reconstruction", "captioning", "generation")}
    assert kinds == {"reconstruction": ("picture",), "captioning": ("caption",), "generation": ("picture",)}
    (edit,) = (edit for edit in edits(source) if edit.scene == target)
    assert found["editing"].kinds == (edit.kind,)
    assert {task: example.edit for task, example in found.items() if example.edit} == {"editing": edit.kind}


def test_several_questions_share_a_picture_or_a_text() -> None:
    for index in range(20):
        (scene,) = draw_example("understanding", SceneOptions(), index).scenes
        for task, opening in (("understanding", "<image>\n"), ("text", f"There is {caption(scene)}.\n")):
            example = draw_example(task, SceneOptions(), index)
            turns = example.conversation.turns
            assert [turn.role for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
            assert turns[0].text.startswith(opening)
            texts = [turn.text.removeprefix(opening) for turn in turns]
            for text, answer in zip(texts[::2], texts[1::2], strict=True):
                assert answer == by_hand(scene, Question("content", text, ""))
            asked = {each.text: each.kind for each in questions(scene, np.random.default_rng(0))}
            kinds = [asked.get(text, "existence") for text in texts[::2]]
            assert list(example.kinds) == kinds


def test_no_question_is_answered_by_those_before() -> None:
    firsts = set()
    for index in range(40):
        (scene,) = draw_example("understanding", SceneOptions(), index).scenes
        asked = informative(questions(scene, np.random.default_rng(index)))
        about = [question.place for question in asked if question.place]
        assert sorted(about) == sorted(PLACES)  # each once
        assert all(question.place in question.text for question in asked if question.place)
        assert [question.kind for question in asked].index("caption") == len(asked) - 1
        assert Counter(question.kind for question in asked if not question.place) == {
            "count": 1, "background": 1, "existence": 1 + (len(scene.pairs) > 1), "caption": 1,
        }  # fmt: skip
        firsts.add(asked[0].kind)
    assert firsts == {"count", "background", "existence", "content", "colour", "shape"}


def test_one_object_share() -> None:
    def counts(share: float) -> Counter[int]:
        options = SceneOptions(min_objects=2, max_objects=3, one_object_share=share)
        return Counter(
            len(draw_example("captioning", options, index).scenes[0].objects) for index in range(100)
        )

    assert set(counts(0)) == {2, 3}
    assert 65 < counts(0.8)[1] < 95
    assert set(counts(1)) == {1}


def test_the_tokenizer_has_the_words_of_the_world(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    assert tokenizer.num_text <= 512
    words = ["star at the top left", *SHAPES, *COLOURS, *RADII, *BACKGROUNDS, *" ".join(PLACES).split()]
    for word in words:
        assert len(tokenizer.encode(f" {word}")) == len(word.split()), word
    for answer in ("yes", "no", "nothing", "3", *SHAPES, *COLOURS, *BACKGROUNDS):
        assert len(tokenizer.encode(answer)) == 1, answer
    before = (tokenizer.folder / "tokenizer.json").stat().st_mtime_ns
    prepare_shapes_tokenizer(tokenizer.folder)  # nothing to do
    assert (tokenizer.folder / "tokenizer.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="is another tokenizer"):
        prepare_shapes_tokenizer(tokenizer.folder, vocab_size=300)


@pytest.mark.parametrize("task", TASKS)
def test_records_are_the_examples(task: WorldTask, tokenizer: TextTokenizer) -> None:
    sizes = ((112, 112), (80, 160))
    part = ConversationsPart(range(3, 11), task, SceneOptions(seed=2), sizes, tokenizer)
    samples = list(part.read())
    assert len(samples) == part.num_items == 8
    assert samples == list(part.read())
    for index, sample in zip(part.indices, samples, strict=True):
        content = json.loads(sample.meta)
        example = draw_example(task, SceneOptions(seed=2), index)
        assert Conversation(tuple(Turn(**turn) for turn in content["turns"])) == example.conversation
        assert content["meta"] == json.loads(example.meta)
        assert (sample.name, sample.split) == (str(index), "")
    found = {(sample.height, sample.width) for sample in samples}
    assert found == ({(0, 0)} if task == "text" else set(sizes))


def test_records_know_their_scenes_and_kinds(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    for task, split in (("editing", "test"), ("text", "train"), ("understanding", "compositional")):
        out = tmp_path / task
        options = {"task": task, "split": split, "count": 8, "ratios": 64}
        prepare_shapes_conversations(out, tokenizer=str(tokenizer.folder), **options)
        store = ConversationStore(out)
        for index in range(8):
            record = store.read(index)
            known = json.loads(record.meta)
            assert list(known) == ["world", "scenes", "kinds", *(["edit"] if task == "editing" else [])]
            assert known["world"] == "shapes"
            example = draw_example(task, SceneOptions(split=split), index)
            assert tuple(map(Scene.from_dict, known["scenes"])) == example.scenes
            assert tuple(known["kinds"]) == example.kinds
            assert known.get("edit") == example.edit
            for scene, data in zip(example.scenes, record.images, strict=True):
                picture = decode(data)
                assert np.array_equal(picture, render(scene, *picture.shape[:2]))


def test_prepare_writes_a_store(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    def prepare(name: str, **options: int) -> Manifest:
        return prepare_shapes_conversations(
            tmp_path / name,
            tokenizer=str(tokenizer.folder),
            task="editing",
            count=12,
            sizes=((64, 64),),
            **options,
        )[""]

    manifest = prepare("one")
    assert manifest.written == 12
    assert manifest.identity["kind"] == "conversations"
    assert manifest.identity["text_tokenizer"] == tokenizer.fingerprint
    assert manifest.fingerprint == prepare("two").fingerprint
    assert manifest.fingerprint != prepare("three", seed=1).fingerprint
    assert prepare("one") == manifest  # nothing to do


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"task": "painting"}, "task is 'painting'"),
        ({"one_object_share": 1.5}, "one_object_share is 1.5"),
        ({"max_objects": 5}, "max_objects=5"),
        ({"split": "all"}, "split is 'all'"),
        ({"sizes": [(64, 64)], "ratios": 64}, "sizes is .* and ratios is 64; give one of them"),
    ],
)
def test_options_out_of_range_are_refused(
    options: dict, complaint: str, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=complaint):
        prepare_shapes_conversations(
            tmp_path / "out", **{"tokenizer": str(tokenizer.folder), "task": "text", "count": 1, **options}
        )
    with pytest.raises(FileNotFoundError, match="no text tokenizer.*illume prepare shapes-tokenizer"):
        prepare_shapes_conversations(tmp_path / "out", tokenizer=str(tmp_path), task="text", count=1)
