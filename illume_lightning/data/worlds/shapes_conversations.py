"""Conversations about the shapes world: every task of the MLLM, with answers that can be checked."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np

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
from illume_lightning.data.worlds.prepare_shapes import check_options, part_indices, picture_sizes
from illume_lightning.data.worlds.shapes import PLACES, UNSEEN_PAIRS, Scene, caption, draw_scene, render
from illume_lightning.data.worlds.shapes_edits import EditKind, draw_edit
from illume_lightning.data.worlds.shapes_questions import informative, questions
from illume_lightning.data.writer import write_stores
from illume_lightning.resolution import Size

_TOKENIZER_SCENES = 500
_ATTEMPT = 2**40  # how far apart the numbers of the scenes are that a record may have


class Example(NamedTuple):
    """A conversation, and what is known of it."""

    conversation: Conversation
    """Turns; images stand where they are looked at or generated."""

    scenes: tuple[Scene, ...]
    """Of its images, in order: what they show."""

    kinds: tuple[str, ...]
    """Of the assistant's turns, in order: the kind of the question or of the edit that it answers, "caption" for
    the task captioning, and "picture" where a picture is made without being edited."""

    edit: EditKind | None = None
    """The kind of the edit, if the task is editing."""

    @property
    def meta(self) -> str:
        """All of this but the conversation, as the JSON of a record's `meta`."""
        known = {"world": "shapes", "scenes": [asdict(scene) for scene in self.scenes], "kinds": self.kinds}
        return json.dumps(known | ({"edit": self.edit} if self.edit else {}), separators=(",", ":"))


@dataclass(frozen=True)
class SceneOptions:
    """Which scenes are drawn.

    Args:
        seed: another seed gives other scenes.
        split: "train", "val", "test" or "compositional"; no scene is ever in two of them.
        min_objects: fewest objects in a scene, from 1.
        max_objects: most objects in a scene, up to 4.
        one_object_share: share of the scenes, 0 to 1, that have one object whatever the limits are.

    Raises:
        ValueError: if the share is out of range.
    """

    seed: int = 0
    split: str = "train"
    min_objects: int = 1
    max_objects: int = 4
    one_object_share: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.one_object_share <= 1:
            raise ValueError(f"one_object_share is {self.one_object_share}; it must be between 0 and 1")


def edit_example(scene: Scene, kind: EditKind, random: np.random.Generator) -> Example | None:
    """An edit of a scene; None if none of this kind leads to a scene of the same split."""
    edit = draw_edit(scene, kind, random)
    if edit is None:
        return None
    return Example(edit_conversation(edit.instruction), (scene, edit.scene), (kind,), kind)


def converse(scene: Scene, task: WorldTask, random: np.random.Generator) -> Example:
    """A conversation about a scene, of any task but editing."""
    kinds: tuple[str, ...]
    if task in ("understanding", "text"):
        asked = informative(questions(scene, random))
        if task == "text":  # the caption is there already
            asked = [question for question in asked if question.kind != "caption"]
        kinds = tuple(question.kind for question in asked)
        pairs = [(question.text, question.answer) for question in asked]
        said = question_conversation(task, caption(scene), pairs)
    else:
        kinds = ("caption",) if task == "captioning" else ("picture",)
        said = picture_conversation(task, caption(scene))
    return Example(said, (scene,) * len(said.is_target), kinds)


def draw_example(task: WorldTask, options: SceneOptions, index: int) -> Example:
    """The example that a record shows; a function of its arguments alone.

    Args:
        task: what the conversation is about.
        options: which scenes are drawn.
        index: number of the record, 0 to 2^40 - 1.
    """
    random = _random(options.seed, index, get_args(WorldTask).index(task))
    limits = (options.min_objects, options.max_objects)
    if random.random() < options.one_object_share:
        limits = (1, 1)
    # Kinds are equally likely in every split, though in a small one few scenes have an edit of a given kind.
    kinds: tuple[EditKind, ...] = get_args(EditKind) if limits[0] < len(PLACES) else ("recolour", "remove")
    kind = kinds[random.integers(len(kinds))]
    while True:
        scene = draw_scene(
            options.seed, index, split=options.split, min_objects=limits[0], max_objects=limits[1]
        )
        if task != "editing":
            return converse(scene, task, random)
        example = edit_example(scene, kind, random)
        if example is not None:
            return example
        index += _ATTEMPT


def prepare_shapes_conversations(
    output: str | Path,
    *,
    tokenizer: str,
    task: WorldTask,
    count: int,
    seed: int = 0,
    split: str = "train",
    sizes: Sequence[Size] | None = None,
    ratios: int | None = None,
    min_objects: int = 1,
    max_objects: int = 4,
    one_object_share: float = 0.0,
    chunk_megabytes: int = 64,
    num_workers: int = 0,
    overwrite: bool = False,
) -> dict[str, Manifest]:
    """Write a store of conversations about shapes; `meta` of each record is that of its `Example`.

    Args:
        output: The folder to make.
        tokenizer: Folder of the text tokenizer, see `illume prepare shapes-tokenizer`; decides lengths.
        task: "reconstruction", "captioning", "generation" from captions, "understanding" (several questions
            about a picture), "editing", or "text" (questions about a caption, without a picture).
        count: Number of conversations.
        seed: Another seed gives other scenes.
        split: "train", "val", "test" or "compositional"; no scene is ever in two of them, nor is an edited one. The
            last has pairs of colour and shape that the others never show or name.
        sizes: Heights and widths in pixels; each conversation's images get one of them at random. By default
            224 x 224.
        ratios: In place of sizes, a side in pixels: the images of half of the conversations are squares of it, the
            others have the paper's other 10 aspect ratios at about its area.
        min_objects: Fewest objects in a scene before it is edited, from 1.
        max_objects: Most objects in a scene before it is edited, up to 4.
        one_object_share: Share of the scenes, 0 to 1, that have one object whatever the limits are.
        chunk_megabytes: Size of a chunk file in MB.
        num_workers: Processes; 0 works in this one. The result does not depend on it.
        overwrite: Replace a store that was made with other options.

    Returns:
        The manifest of the store, under "".

    Raises:
        FileNotFoundError: If the folder has no tokenizer.
        ValueError: If an option is out of range, or `output` holds something else.
    """
    check_task(task)
    drawn = picture_sizes(sizes, ratios)
    check_options(count, seed, split, drawn, min_objects, max_objects)
    scenes = SceneOptions(seed, split, min_objects, max_objects, one_object_share)
    text_tokenizer = TextTokenizer(tokenizer)
    identity = {
        "kind": "conversations", "text_tokenizer": text_tokenizer.fingerprint, "world": "shapes", "task": task,
        "count": count, "seed": seed, "split": split, "unseen_pairs": UNSEEN_PAIRS, "sizes": drawn,
        "min_objects": min_objects, "max_objects": max_objects, "one_object_share": one_object_share,
    }  # fmt: skip
    return write_stores(
        output,
        identity,
        lambda: [
            ConversationsPart(indices, task, scenes, drawn, text_tokenizer) for indices in part_indices(count)
        ],
        chunk_megabytes=chunk_megabytes,
        num_workers=num_workers,
        overwrite=overwrite,
    )


@dataclass(frozen=True)
class ConversationsPart:
    """Some numbers of the conversations that `prepare_shapes_conversations` writes."""

    indices: range
    task: WorldTask
    options: SceneOptions
    sizes: tuple[Size, ...]
    tokenizer: TextTokenizer

    @property
    def num_items(self) -> int:
        """Number of conversations."""
        return len(self.indices)

    def read(self) -> Iterator[Sample | Lost]:
        """Draw the conversations and their images."""
        for index in self.indices:
            example = draw_example(self.task, self.options, index)
            # A stream of its own: the scenes do not change with the list of sizes.
            random = _random(self.options.seed, index, len(get_args(WorldTask)))
            size = self.sizes[random.integers(len(self.sizes))]
            images = [encode_png(render(scene, *size), compress_level=1) for scene in example.scenes]
            sizes = [size] * len(images)
            yield make_sample(
                str(index), example.conversation, images, sizes, self.tokenizer, meta=example.meta
            )


def prepare_shapes_tokenizer(output: str | Path, vocab_size: int = 512) -> None:
    """Train a text tokenizer on the words of this world; always the same one.

    Args:
        output: The folder to make; gets `tokenizer.json`.
        vocab_size: Most text tokens; at least 259.

    Raises:
        ValueError: If the size is too small, or the folder has another tokenizer.
    """
    conversations = (
        draw_example(task, SceneOptions(), index).conversation
        for task in get_args(WorldTask)
        for index in range(_TOKENIZER_SCENES)
    )
    keep_tokenizer(output, conversations, vocab_size)


def _random(seed: int, index: int, stream: int) -> np.random.Generator:
    """A generator that depends on its arguments only."""
    return np.random.default_rng((seed, index, stream))
