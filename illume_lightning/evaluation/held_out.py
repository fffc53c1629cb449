"""Held-out conversations as what a user would ask: questions one by one, and pictures to make or to change."""

import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from PIL import Image

from illume_lightning.data.chat import EDIT, GENERATE, filled
from illume_lightning.data.conversation import IMAGE
from illume_lightning.data.conversation_store import ConversationRecord, ConversationStore
from illume_lightning.data.image import decode
from illume_lightning.data.worlds.shapes import Scene

log = logging.getLogger(__name__)

QUESTIONS_PER_CONVERSATION = 4

Message = dict[str, Any]


class Question(NamedTuple):
    """Something to say a few words about."""

    text: str
    answer: str
    """The right one."""
    kind: str
    """Of the question; empty where nobody knows."""
    history: tuple[Message, ...]
    """Messages before it, with the right answers. Questions about a picture have none, for earlier answers give
    later ones away."""
    images: tuple[Image.Image, ...]

    @property
    def words(self) -> str:
        """All that is said up to it."""
        return "\n".join([*(message["content"] for message in self.history), self.text])

    def messages(self, with_images: bool = True) -> list[Message]:
        """The conversation that it ends."""
        content: list[dict[str, Any]] = [
            {"type": "image", "image": image} for image in (self.images if with_images else ())
        ]
        return [*self.history, {"role": "user", "content": [*content, {"type": "text", "text": self.text}]}]


class Wish(NamedTuple):
    """A picture to make of words, or a source to change."""

    prompt: str
    """What it shows, or what to change."""
    source: Image.Image | None
    wanted: Image.Image
    scenes: tuple[Scene, ...]
    """Of the source, if there is one, and of the wanted picture; empty where nobody knows."""
    kind: str
    """Of the edit; empty where nobody knows."""


@dataclass
class HeldOut:
    """What some conversations of a store ask."""

    questions: list[Question] = field(default_factory=list)
    wishes: list[Wish] = field(default_factory=list)
    num_conversations: int = 0
    """Of the store, that were read."""
    left_out: int = 0
    """Of them, those that ask for pictures in other words than Illume's."""

    @property
    def is_about_pictures(self) -> bool:
        """Whether a question shows one."""
        return any(question.images for question in self.questions)


def read_held_out(store: ConversationStore, limit: int) -> HeldOut:
    """Read conversations spread evenly over a store, and choose questions so that kinds come equally often.

    Args:
        store: to read.
        limit: most conversations.
    """
    count = min(limit, len(store))
    found, seen = HeldOut(num_conversations=count), Counter[str]()
    for number in range(count):
        record = store.read(number * len(store) // count)
        knowledge = json.loads(record.meta)
        if record.conversation.task in ("text", "understanding"):
            found.questions += _choose(list(_questions(record, knowledge)), seen)
        elif (wish := _wish(record, knowledge)) is not None:
            found.wishes.append(wish)
        else:
            found.left_out += 1
    if found.left_out:
        log.warning(
            "%s: %d of %d conversations ask for pictures in other words than Illume.generate and Illume.edit do, and "
            "are left out",
            store.location,
            found.left_out,
            count,
        )
    return found


def _questions(record: ConversationRecord, knowledge: dict[str, Any]) -> Iterator[Question]:
    """Every user's turn with the answer to it."""
    turns = record.conversation.turns
    pictures = [Image.fromarray(decode(data)) for data in record.images]
    kinds = knowledge.get("kinds", ())
    said: list[Message] = []
    shown = number = 0
    for turn, answer in zip(turns, (*turns[1:], None), strict=True):
        shown += turn.text.count(IMAGE)
        if turn.role == "user" and answer is not None and answer.role == "assistant":
            text = turn.text.replace(IMAGE, "").strip()
            system = tuple(message for message in said if message["role"] == "system")
            history = system if pictures else tuple(said)
            kind = kinds[number] if number < len(kinds) else ""
            if text:
                yield Question(text, answer.text.strip(), kind, history, tuple(pictures[:shown]))
            number += 1
        said.append({"role": turn.role, "content": turn.text})


def _choose(questions: list[Question], seen: Counter[str]) -> list[Question]:
    """A few of a conversation's, always of the kind that came least often so far."""
    chosen: list[Question] = []
    while questions and len(chosen) < QUESTIONS_PER_CONVERSATION:
        best = min(questions, key=lambda question: seen[question.kind])
        questions.remove(best)
        seen[best.kind] += 1
        chosen.append(best)
    return chosen


def _wish(record: ConversationRecord, knowledge: dict[str, Any]) -> Wish | None:
    """What a request that is answered by one picture asks for; none if it is another one."""
    turns, pictures = record.conversation.turns, record.images
    if [turn.role for turn in turns] != ["user", "assistant"] or turns[1].text != IMAGE or len(pictures) > 2:
        return None
    prompt = filled(GENERATE if len(pictures) == 1 else EDIT, turns[0].text)
    if prompt is None:
        return None
    *sources, wanted = (Image.fromarray(decode(data)) for data in pictures)
    scenes = _scenes(knowledge)
    return Wish(
        prompt,
        sources[0] if sources else None,
        wanted,
        scenes if len(scenes) == len(pictures) else (),
        knowledge.get("edit", ""),
    )


def _scenes(knowledge: dict[str, Any]) -> tuple[Scene, ...]:
    if knowledge.get("world") != "shapes":
        return ()
    return tuple(map(Scene.from_dict, knowledge["scenes"]))
