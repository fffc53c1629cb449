"""Conversations about the emoji world: every task of the MLLM, with answers from the names, tags and groups."""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
from PIL import Image, ImageOps

from illume_lightning.data.conversation import Conversation
from illume_lightning.data.conversation_store import make_sample
from illume_lightning.data.image import encode_png
from illume_lightning.data.part import Lost, Sample
from illume_lightning.data.store import Manifest
from illume_lightning.data.text_tokenizer import TextTokenizer
from illume_lightning.data.worlds.conversations import (
    WorldTask,
    check_task,
    edit_conversation,
    keep_tokenizer,
    picture_conversation,
    question_conversation,
)
from illume_lightning.data.worlds.emoji import (
    NAMES,
    PACKAGES,
    PERSONS,
    Emoji,
    check_holdout,
    composite,
    list_emoji,
    normal_code,
    picture_paths,
    split_of,
    stable_hash,
)  # fmt: skip
from illume_lightning.data.writer import write_stores

GROUPS = (
    "smileys and emotion", "people and body", "components", "animals and nature", "food and drink",
    "travel and places", "activities", "objects", "symbols", "flags",
)  # fmt: skip
"""emojibase's groups, by number."""

MAX_TAGS = 3
"""Tags of a caption."""

_HOLDOUT = 0.1
_PART_ITEMS = 1024
_SKIN_TONE = re.compile(r"([\w-]+) skin tone")
_SINGULAR = {(): "a person", ("person",): "a person", ("man",): "a man", ("woman",): "a woman"}
_PLURAL = {("people",): "people", ("men",): "men", ("women",): "women"}


class Look(NamedTuple):
    """What the label of an emoji says, in parts; two emoji that differ in one part differ in nothing else."""

    form: str
    """The label without the other parts; of a runner "running"."""

    persons: tuple[str, ...]
    """Who it is: ("woman",), ("men",), ("woman", "and", "man"), or nobody."""

    tone: str
    """Skin tone, "light" to "dark"; "default" if none is said."""


class Edit(NamedTuple):
    """A change that leads from one emoji to another."""

    source: Emoji
    target: Emoji

    instruction: str
    """Without a full stop."""


class Example(NamedTuple):
    """A conversation, and what its images show."""

    name: str
    """Codes of its emoji, and the number of the copy."""

    conversation: Conversation
    """Turns; images stand where they are looked at or generated."""

    emojis: tuple[Emoji, ...]
    """Of its images, in order."""

    background: tuple[int, int, int]
    """The colour behind all of them, RGB, 0 to 255."""

    split: str
    """ "train" or "val", as in `prepare_emoji`."""


def look(emoji: Emoji) -> Look:
    """The parts of an emoji's label."""
    label, tone = emoji.label.lower(), "default"
    if emoji.tone:
        tone = " and ".join(_SKIN_TONE.findall(label))
        label = _SKIN_TONE.sub("", label)
    words = [word for word in re.split(r"[\s,:]+", label) if word]
    persons = tuple(word for word in words if word in PERSONS)
    return Look(" ".join(word for word in words if word not in PERSONS), persons, tone)


def caption(emoji: Emoji) -> str:
    """Label and first tags in a phrase: "an emoji of pizza, standing for cheese, food and hungry"."""
    tags = _tags(emoji)
    return f"an emoji of {emoji.label}, standing for {tags}" if tags else f"an emoji of {emoji.label}"


def edits(emojis: Sequence[Emoji]) -> list[Edit]:
    """Every change of skin tone or person alone between two of the emoji, in both directions."""
    families: defaultdict[tuple[object, ...], list[tuple[str, Emoji]]] = defaultdict(list)
    for emoji in emojis:
        form, persons, tone = look(emoji)
        families["tone", emoji.base, form, persons].append((f"make the skin tone {tone}", emoji))
        if form.startswith("family"):
            continue  # its persons are parents, and "it" would be all of the family
        if persons in _SINGULAR:
            families["one", emoji.base, form, tone].append((f"make it {_SINGULAR[persons]}", emoji))
        elif persons in _PLURAL:
            families["many", emoji.base, form, tone].append((f"make them {_PLURAL[persons]}", emoji))
    return [
        Edit(source, target, instruction)
        for family in families.values()
        for _, source in family
        for instruction, target in family
        if source != target
    ]


def questions(
    emoji: Emoji, group: str, peers: Sequence[Emoji], random: np.random.Generator
) -> list[tuple[str, str]]:
    """What is asked about an emoji's picture, and the answers, in random order.

    Args:
        emoji: Asked about.
        group: Name of its group.
        peers: Emoji it could be mistaken for, itself among them.
        random: Decides the order and, for the choice between two, the other one.
    """
    asked = [("What is it?", emoji.label), ("Which group is it from?", group)]
    if emoji.tone:
        asked.append(("What is the skin tone?", look(emoji).tone))
    if len(peers) > 1:
        number = int(random.integers(len(peers)))
        other = peers[number] if peers[number] != emoji else peers[number - 1]
        first, second = random.permutation([emoji.label, other.label]).tolist()
        asked.append((f"Is it {first} or {second}?", emoji.label))
    return [asked[number] for number in random.permutation(len(asked))]


def list_examples(
    package_dir: str | Path, task: WorldTask, *, holdout: float = _HOLDOUT, seed: int = 0, copies: int = 1
) -> list[Example]:
    """Every conversation of a task; a function of its arguments alone.

    Args:
        package_dir: Where the npm packages are.
        task: What the conversations are about.
        holdout: Share of the base names that goes to "val", above 0 and below 1.
        seed: Another seed gives other backgrounds and questions.
        copies: Conversations about each emoji, or each edit.

    Raises:
        FileNotFoundError: If the packages are not there.
    """
    emojis = list_emoji(package_dir)
    groups = _read_groups(package_dir)
    peers: defaultdict[tuple[str, str], list[Emoji]] = defaultdict(list)
    for emoji in emojis:
        peers[split_of(emoji, holdout), groups[emoji.code]].append(emoji)
    subjects: Sequence[Edit | Emoji] = edits(emojis) if task == "editing" else emojis
    examples = []
    for copy in range(copies):
        for subject in subjects:
            shown: tuple[Emoji, ...] = subject[:2] if isinstance(subject, Edit) else (subject,)
            name = f"{'>'.join(emoji.code for emoji in shown)}#{copy}"
            random = np.random.default_rng((seed, stable_hash(f"{task} {name}")))
            red, green, blue = random.integers(0, 256, 3).tolist()
            split = split_of(shown[0], holdout)
            if isinstance(subject, Edit):
                said = edit_conversation(subject.instruction)
            else:
                group = groups[subject.code]
                said = _converse(task, subject, group, peers[split, group], random)
                shown = shown * len(said.is_target)
            examples.append(Example(name, said, shown, (red, green, blue), split))
    return examples


def prepare_emoji_conversations(
    output: str | Path,
    package_dir: str | Path,
    *,
    tokenizer: str,
    task: WorldTask,
    holdout: float = _HOLDOUT,
    seed: int = 0,
    copies: int = 1,
    side: int = 160,
    chunk_megabytes: int = 64,
    num_workers: int = 0,
    overwrite: bool = False,
) -> dict[str, Manifest]:
    """Write conversations about emoji to `<output>/train` and `<output>/val`, split as by `illume prepare emoji`.

    All images of a conversation have one background, a random plain colour.

    Args:
        output: The folder to make.
        package_dir: Where the npm packages are, see `illume prepare emoji`.
        tokenizer: Folder of the text tokenizer, see `illume prepare emoji-tokenizer`; decides lengths.
        task: "reconstruction", "captioning", "generation" from captions, "understanding" (several questions
            about a picture), "editing" (another skin tone or person), or "text" (questions about a caption,
            without a picture).
        holdout: Share of the base names that goes to "val", above 0 and below 1.
        seed: Another seed gives other backgrounds and questions; the splits stay.
        copies: Conversations about each emoji, or each edit, on different backgrounds.
        side: Height and width of the pictures in pixels, 16 to 256.
        chunk_megabytes: Size of a chunk file in MB.
        num_workers: Processes; 0 works in this one. The result does not depend on it.
        overwrite: Replace stores that were made with other options.

    Returns:
        The manifests, by split.

    Raises:
        FileNotFoundError: If the packages or the tokenizer are missing.
        ValueError: If an option is out of range, or `output` holds something else.
    """
    _check_options(task, holdout, seed, copies, side)
    text_tokenizer = TextTokenizer(tokenizer)
    identity = {
        "kind": "conversations", "text_tokenizer": text_tokenizer.fingerprint, "world": "emoji", "task": task,
        "packages": PACKAGES, "holdout": holdout, "seed": seed, "copies": copies, "side": side,
    }  # fmt: skip

    def parts() -> list[EmojiConversationsPart]:
        examples = list_examples(package_dir, task, holdout=holdout, seed=seed, copies=copies)
        return [
            EmojiConversationsPart(
                tuple(examples[start : start + _PART_ITEMS]), Path(package_dir), side, text_tokenizer
            )
            for start in range(0, len(examples), _PART_ITEMS)
        ]

    return write_stores(
        output,
        identity,
        parts,
        splits=("train", "val"),
        chunk_megabytes=chunk_megabytes,
        num_workers=num_workers,
        overwrite=overwrite,
    )


@dataclass(frozen=True)
class EmojiConversationsPart:
    """Some of the conversations that `prepare_emoji_conversations` writes."""

    examples: tuple[Example, ...]
    package_dir: Path
    side: int
    tokenizer: TextTokenizer

    @property
    def num_items(self) -> int:
        """Number of conversations."""
        return len(self.examples)

    def read(self) -> Iterator[Sample | Lost]:
        """Draw the images."""
        paths = picture_paths(self.package_dir)
        for name, conversation, emojis, background, split in self.examples:
            images = [self._draw(paths[emoji.code], background) for emoji in emojis]
            sizes = [(self.side, self.side)] * len(images)
            yield make_sample(name, conversation, images, sizes, self.tokenizer, split=split)

    def _draw(self, path: Path, background: tuple[int, int, int]) -> bytes:
        """An emoji on its background. Four of all pictures are not square; the centre is kept."""
        image = Image.fromarray(composite(path.read_bytes(), background))
        fitted = ImageOps.fit(image, (self.side, self.side), Image.Resampling.BICUBIC)
        return encode_png(np.asarray(fitted), compress_level=1)


def prepare_emoji_tokenizer(output: str | Path, package_dir: str | Path, vocab_size: int = 2048) -> None:
    """Train a text tokenizer on what is said in this world's "train" split; always the same one.

    Args:
        output: The folder to make; gets `tokenizer.json`.
        package_dir: Where the npm packages are, see `illume prepare emoji`.
        vocab_size: Most text tokens; at least 259.

    Raises:
        FileNotFoundError: If the packages are missing.
        ValueError: If the size is too small, or the folder has another tokenizer.
    """
    examples = chain.from_iterable(list_examples(package_dir, task) for task in get_args(WorldTask))
    conversations = (example.conversation for example in examples if example.split == "train")
    keep_tokenizer(output, conversations, vocab_size)


def _converse(
    task: WorldTask, emoji: Emoji, group: str, peers: Sequence[Emoji], random: np.random.Generator
) -> Conversation:
    """A conversation about one emoji; see `questions` for the last three."""
    if task not in ("understanding", "text"):
        return picture_conversation(task, caption(emoji))
    asked = questions(emoji, group, peers, random)
    if task == "text" and _tags(emoji):
        asked.insert(int(random.integers(len(asked) + 1)), ("What does it stand for?", _tags(emoji)))
    return question_conversation(task, caption(emoji), asked)


def _tags(emoji: Emoji) -> str:
    """The first tags that the label does not say already: "cheese, food and hungry"; empty if there are none."""
    words = re.split(r"[\s,:]+", emoji.label.lower())
    tags = [tag for tag in emoji.tags if tag.lower() not in words][:MAX_TAGS]
    return f"{', '.join(tags[:-1])} and {tags[-1]}" if len(tags) > 1 else "".join(tags)


def _read_groups(package_dir: str | Path) -> dict[str, str]:
    """Names of the groups, by code; "other" for the few emoji that have none."""
    entries = json.loads((Path(package_dir) / NAMES).read_text())
    return {
        normal_code(variant["hexcode"]): GROUPS[entry["group"]] if "group" in entry else "other"
        for entry in entries
        for variant in (entry, *entry.get("skins", ()))
    }


def _check_options(task: str, holdout: float, seed: int, copies: int, side: int) -> None:
    check_task(task)
    check_holdout(holdout)
    if seed < 0 or copies < 1:
        raise ValueError(f"seed={seed} must be at least 0, copies={copies} at least 1")
    if not 16 <= side <= 256:
        raise ValueError(f"side is {side}; it must be between 16 and 256 pixels")
