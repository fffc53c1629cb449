"""Conversations about emoji: answers are what the names say, edits change one thing, splits share no base name."""

import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image
from test_emoji import package_dir, picture  # noqa: F401  # a fixture

from illume_lightning.data.conversation import IMAGE, Turn
from illume_lightning.data.conversation_store import ConversationRecord, ConversationStore
from illume_lightning.data.image import decode
from illume_lightning.data.store import Manifest
from illume_lightning.data.text_tokenizer import TextTokenizer
from illume_lightning.data.worlds.conversations import WorldTask
from illume_lightning.data.worlds.emoji import NAMES, Emoji, list_emoji, picture_paths, split_of
from illume_lightning.data.worlds.emoji_conversations import (
    Look,
    caption,
    edits,
    list_examples,
    look,
    prepare_emoji_conversations,
    prepare_emoji_tokenizer,
    questions,
)  # fmt: skip

TASKS: tuple[WorldTask, ...] = get_args(WorldTask)
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
HOLDOUT = 0.5


@pytest.fixture
def packages(package_dir: Path) -> Path:  # noqa: F811
    """The packages of test_emoji with more people in all skin tones, and a picture of another colour for each code."""
    entries = json.loads((package_dir / NAMES).read_text())
    for number, activity in enumerate(("swimming", "climbing", "juggling", "surfing")):
        for place, who in enumerate(("person", "man", "woman")):
            code = f"1F6C{number}-{place}"
            skins = [
                {
                    "label": f"{who} {activity}: {name} skin tone",
                    "hexcode": f"{code}-1F3F{tone}",
                    "tone": tone,
                }
                for tone, name in enumerate(TONES, 1)
            ]
            entry = {"label": f"{who} {activity}", "hexcode": code, "group": 1, "skins": skins}
            entries.append({**entry, "tags": ["sport", activity, "fun", "water", "summer"]})
    (package_dir / NAMES).write_text(json.dumps(entries))
    assets = next(iter(picture_paths(package_dir).values())).parent
    codes = [each["hexcode"].lower() for entry in entries for each in (entry, *entry.get("skins", ()))]
    for code in codes:
        (assets / f"{code}.webp").write_bytes(picture())
    for number, path in enumerate(sorted(picture_paths(package_dir).values())):
        pixels = np.array(Image.open(io.BytesIO(picture())))
        pixels[..., 0] = number
        Image.fromarray(pixels).save(path, lossless=True, exact=True)
    return package_dir


@pytest.fixture
def tokenizer(packages: Path) -> TextTokenizer:
    prepare_emoji_tokenizer(packages / "tokenizer", packages, vocab_size=400)
    return TextTokenizer(packages / "tokenizer")


def prepare(packages: Path, name: str, task: WorldTask, **options: int) -> dict[str, Manifest]:
    return prepare_emoji_conversations(
        packages / name,
        packages,
        tokenizer=str(packages / "tokenizer"),
        task=task,
        holdout=HOLDOUT,
        **{"side": 32, **options},
    )


def read(packages: Path, name: str) -> dict[str, list[ConversationRecord]]:
    stores = {split: ConversationStore(packages / name / split) for split in ("train", "val")}
    return {split: [store.read(index) for index in range(len(store))] for split, store in stores.items()}


def shown(packages: Path, record: ConversationRecord) -> tuple[list[str], set[tuple[int, ...]]]:
    """Labels of the emoji on a record's images, from their pixels alone, and the colours of the backgrounds."""
    labels, backgrounds = [], set()
    paths = sorted((path, code) for code, path in picture_paths(packages).items())
    numbers = {code: number for number, (_, code) in enumerate(paths)}
    named = {numbers[emoji.code]: emoji.label for emoji in list_emoji(packages)}
    for data in record.images:
        pixels = decode(data)
        assert pixels.shape == (32, 32, 3)
        labels.append(named[int(pixels[16, 2, 0])])
        backgrounds.add(tuple(pixels[16, 29].tolist()))
    return labels, backgrounds


def emoji_of(record: ConversationRecord, packages: Path) -> list[Emoji]:
    by_code = {emoji.code: emoji for emoji in list_emoji(packages)}
    return [by_code[code] for code in record.source.split("#")[0].split(">")]


@pytest.mark.parametrize("task", TASKS)
def test_every_task_to_a_store_and_back(task: WorldTask, packages: Path, tokenizer: TextTokenizer) -> None:
    manifests = prepare(packages, "out", task)
    records = read(packages, "out")
    examples = list_examples(packages, task, holdout=HOLDOUT)
    kinds = {"reconstruction": "editing", "captioning": "understanding"}
    for split, found in records.items():
        expected = [example for example in examples if example.split == split]
        assert len(found) == len(expected) == manifests[split].written > 10
        for record, example in zip(found, expected, strict=True):
            assert (record.source, record.conversation) == (example.name, example.conversation)
            assert record.conversation.task == kinds.get(task, task)
            labels, backgrounds = shown(packages, record)
            assert labels == [emoji.label for emoji in example.emojis]
            assert backgrounds == ({example.background} if labels else set())
            assert len(labels) == {"text": 0, "reconstruction": 2, "editing": 2}.get(task, 1)
    bases = {
        split: {emoji.base for record in found for emoji in emoji_of(record, packages)}
        for split, found in records.items()
    }
    assert not bases["train"] & bases["val"]
    assert {split_of(emoji, HOLDOUT) for emoji in list_emoji(packages) if emoji.base in bases["val"]} == {
        "val"
    }


def obey(label: str, instruction: str) -> str:
    """The label after an instruction, from its words alone."""
    body, _, tone = label.partition(": ")
    if instruction.startswith("make the skin tone "):
        tone = instruction.removeprefix("make the skin tone ") + " skin tone"
        return body if tone == "default skin tone" else f"{body}: {tone}"
    _, activity = body.split(" ", 1)
    who = instruction.removeprefix("make it a ")
    return f"{who} {activity}: {tone}" if tone else f"{who} {activity}"


def test_edits_change_what_they_say_and_go_both_ways(packages: Path) -> None:
    found = edits(list_emoji(packages))
    pairs = {(edit.source.code, edit.target.code) for edit in found}
    assert len(pairs) == len(found)
    assert {(target, source) for source, target in pairs} == pairs
    for source, target, instruction in found:
        assert source.base == target.base
        assert target.label == obey(source.label, instruction) != source.label
    # Four activities by 3 persons and 6 tones, and running by 3 persons and 4 tones.
    counts = Counter(edit.instruction.startswith("make the skin tone") for edit in found)
    assert counts == {True: 4 * 3 * 30 + 3 * 12, False: 4 * 6 * 6 + 4 * 6}


def described(label: str, base: str, *tone: int) -> Emoji:
    return Emoji(label, label, base, (), tone)


@pytest.mark.parametrize(
    ("label", "tone", "expected"),
    [
        ("waving hand: medium-dark skin tone", (4,), Look("waving hand", (), "medium-dark")),
        ("woman: dark skin tone, blond hair", (5,), Look("blond hair", ("woman",), "dark")),
        ("kiss: woman, man, light skin tone", (1,), Look("kiss", ("woman", "man"), "light")),
        ("man running facing right", (), Look("running facing right", ("man",), "default")),
        ("light skin tone", (), Look("light skin tone", (), "default")),
    ],
)
def test_look(label: str, tone: tuple[int, ...], expected: Look) -> None:
    assert look(Emoji("1f600", label, "", (), tone)) == expected


def test_only_comparable_emoji_become_edits() -> None:
    emojis = [
        described("elf", "elf"),
        described("woman elf", "elf"),
        described("people wrestling", "wrestling"),
        described("men wrestling", "wrestling"),
        described("man running", "running"),
        described("woman running facing right", "running"),  # another picture altogether
        described("man elf: dark skin tone", "elf", 5),  # two things differ
        described("kiss: man, man", "kiss"),
        described("kiss: woman, man", "kiss"),  # which of them?
        described("family: man, boy", "family boy"),
        described("family: woman, boy", "family boy"),
    ]
    assert {(edit.source.label, edit.instruction, edit.target.label) for edit in edits(emojis)} == {
        ("elf", "make it a woman", "woman elf"),
        ("woman elf", "make it a person", "elf"),
        ("people wrestling", "make them men", "men wrestling"),
        ("men wrestling", "make them people", "people wrestling"),
    }


def test_caption() -> None:
    tags = ("pizza", "cheese", "food", "hungry", "slice")
    emoji = Emoji("1f355", "pizza", "pizza", tags, ())
    assert caption(emoji) == "an emoji of pizza, standing for cheese, food and hungry"
    assert caption(Emoji("1f355", "pizza", "pizza", tags[:2], ())) == "an emoji of pizza, standing for cheese"
    assert caption(Emoji("1f355", "pizza", "pizza", tags[:1], ())) == "an emoji of pizza"


def test_captions_and_instructions_reach_the_prompts(packages: Path) -> None:
    turns = {task: list_examples(packages, task)[-1].conversation.turns for task in TASKS}
    said = "an emoji of woman surfing: dark skin tone, standing for sport, fun and water"
    assert turns["captioning"] == (Turn("user", "<image>\nDescribe the image."), Turn("assistant", said))
    assert turns["generation"] == (
        Turn("user", f"Generate an image of {{resolution_tag}}, the content of image is {said}\n"),
        Turn("assistant", IMAGE),
    )
    for example in list_examples(packages, "editing"):
        source, target = example.emojis
        request, answer = example.conversation.turns
        found = re.fullmatch(
            r"<image>\nPlease edit the image according to the instruction: (.*)\.\n", request.text
        )
        assert obey(source.label, found[1]) == target.label
        assert answer == Turn("assistant", IMAGE)
    assert turns["text"][0].text.startswith(f"There is {said}.\n")


@pytest.mark.parametrize("task", ["understanding", "text"])
def test_answers_are_what_the_names_say(task: WorldTask, packages: Path) -> None:
    split = {emoji.label: split_of(emoji, HOLDOUT) for emoji in list_emoji(packages)}
    emojis = {emoji.code: emoji for emoji in list_emoji(packages)}
    asked: Counter[str] = Counter()
    first_named, openings = [], set()
    for example in list_examples(packages, task, holdout=HOLDOUT):
        emoji, turns = emojis[example.name.split("#")[0]], example.conversation.turns
        opening, first = turns[0].text.split("\n")
        openings.add(opening)
        texts = [first, *[turn.text for turn in turns[1:]]]
        assert [turn.role for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        for question, answer in zip(texts[::2], texts[1::2], strict=True):
            asked[question.split()[0] + question.split()[-1]] += 1
            if question.startswith("Is it "):
                one, other = question.removeprefix("Is it ").removesuffix("?").split(" or ")
                assert emoji.label == answer in (one, other) and one != other
                assert split[one] == split[other]
                first_named.append(one == answer)
            else:
                people = "running" in emoji.label or emoji.tags[:1] == ("sport",)
                assert (
                    answer
                    == {
                        "What is it?": emoji.label,
                        "Which group is it from?": "people and body" if people else "food and drink",
                        "What is the skin tone?": emoji.label.split(": ")[-1].removesuffix(" skin tone"),
                        "What does it stand for?": "t" if "thing" in emoji.label else "sport, fun and water",
                    }[question]
                )
    expected = {"Whatit?": 104, "Whichfrom?": 104, "Whattone?": 69}
    assert {name: asked[name] for name in expected} == expected
    assert len(first_named) == 104 and 30 < sum(first_named) < 74
    assert asked["Whatfor?"] == (0 if task == "understanding" else 92)  # the runners have no tags
    assert len(openings) == (1 if task == "understanding" else 104)


def test_questions_come_in_any_order_and_need_a_peer() -> None:
    emoji, other = described("cat: dark skin tone", "cat", 5), described("dog", "dog")
    asked = [questions(emoji, "animals", [emoji, other], np.random.default_rng(n)) for n in range(40)]
    assert asked[3] == questions(emoji, "animals", [emoji, other], np.random.default_rng(3))
    assert {len(each) for each in asked} == {4}
    assert len({each[0][0].split()[1] + each[0][0][-4:] for each in asked}) >= 4
    assert len(questions(emoji, "animals", [emoji], np.random.default_rng(0))) == 3


def test_seeds_and_copies(packages: Path, tokenizer: TextTokenizer) -> None:
    first = prepare(packages, "one", "understanding")
    assert first == prepare(packages, "one", "understanding")  # nothing to do
    assert first["train"].identity["world"] == "emoji"
    assert first["train"].identity["text_tokenizer"] == tokenizer.fingerprint
    again = prepare(packages, "two", "understanding")
    other = prepare(packages, "three", "understanding", seed=1)
    twice = prepare(packages, "four", "understanding", copies=2)
    for split in ("train", "val"):
        assert first[split].fingerprint == again[split].fingerprint != other[split].fingerprint
        assert first[split].written == other[split].written == twice[split].written // 2
    examples = {
        seed: list_examples(packages, "understanding", holdout=HOLDOUT, seed=seed, copies=2)
        for seed in (0, 1)
    }
    assert [each.name for each in examples[0]] == [each.name for each in examples[1]]
    assert [each.split for each in examples[0]] == [each.split for each in examples[1]]
    backgrounds = [each.background for each in examples[0] + examples[1]]
    assert len(set(backgrounds)) == len(backgrounds) == 4 * 104


def test_the_tokenizer_learns_the_train_split_alone(packages: Path, tokenizer: TextTokenizer) -> None:
    assert tokenizer.num_text == 400
    assert len(tokenizer.encode(" medium-light skin tone")) <= 5
    held_out = {emoji.label for emoji in list_emoji(packages) if split_of(emoji, 0.1) == "val"}
    assert held_out
    entries = json.loads((packages / NAMES).read_text())
    for entry in entries:
        if entry["label"] in held_out:
            entry["tags"] = ["zebra zebra zebra", "quixotic zebra", "zebra"]
    (packages / NAMES).write_text(json.dumps(entries))
    prepare_emoji_tokenizer(packages / "tokenizer", packages, vocab_size=400)  # nothing to do
    with pytest.raises(ValueError, match="is another tokenizer"):
        prepare_emoji_tokenizer(packages / "tokenizer", packages, vocab_size=300)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"task": "painting"}, "task is 'painting'"),
        ({"holdout": 1.0}, "holdout is 1.0"),
        ({"seed": -1}, "seed=-1"),
        ({"copies": 0}, "copies=0"),
        ({"side": 512}, "side is 512"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=complaint):
        prepare_emoji_conversations(
            tmp_path / "out", tmp_path, **{"tokenizer": str(tmp_path), "task": "text", **options}
        )


def test_what_is_missing_is_named(packages: Path, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no text tokenizer.*illume prepare emoji-tokenizer"):
        prepare_emoji_conversations(tmp_path / "out", packages, tokenizer=str(tmp_path), task="text")
    with pytest.raises(FileNotFoundError, match="npm install"):
        prepare_emoji_conversations(
            tmp_path / "out", tmp_path / "none", tokenizer=str(tokenizer.folder), task="text"
        )
    with pytest.raises(FileNotFoundError, match="npm install"):
        prepare_emoji_tokenizer(tmp_path / "tokenizer", tmp_path / "none")
