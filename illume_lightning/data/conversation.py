"""Conversations: what a sample of the MLLM says and shows, before any token."""

import json
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Literal

IMAGE = "<image>"
"""Stands for the next of a conversation's images; in an assistant's turn, for one to generate."""

RESOLUTION_TAG = "{resolution_tag}"
"""Stands for the size tokens of the image to generate next."""

Role = Literal["system", "user", "assistant"]
Task = Literal["text", "understanding", "generation", "editing"]


@dataclass(frozen=True)
class Turn:
    """What one side says."""

    role: Role
    """Only the assistant's turns are learned."""

    text: str
    """With `IMAGE` where an image stands, and `RESOLUTION_TAG` where a size does; nothing else is special."""


@dataclass(frozen=True)
class Conversation:
    """Turns in order, with at most one system turn, the first."""

    turns: tuple[Turn, ...]

    @cached_property
    def is_target(self) -> tuple[bool, ...]:
        """Whether each image, in order of appearance, is to be generated; the others are input."""
        return tuple(turn.role == "assistant" for turn in self.turns for _ in range(turn.text.count(IMAGE)))

    @property
    def task(self) -> Task:
        """What is to be learned, by where images stand."""
        if not self.is_target:
            return "text"
        if all(self.is_target):
            return "generation"
        return "editing" if any(self.is_target) else "understanding"

    def without_condition(self) -> "Conversation":
        """The unconditional branch of guidance: users' texts are masked, images and sizes stay (paper 3.2)."""
        keep = re.compile(f"{re.escape(IMAGE)}|{re.escape(RESOLUTION_TAG)}")
        return Conversation(
            tuple(
                Turn(turn.role, "".join(keep.findall(turn.text))) if turn.role == "user" else turn
                for turn in self.turns
            )
        )

    def to_json(self) -> str:
        """One line of JSON, the same for equal conversations."""
        return json.dumps([asdict(turn) for turn in self.turns], ensure_ascii=False, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> "Conversation":
        """The conversation that `to_json` wrote."""
        return Conversation(tuple(Turn(**turn) for turn in json.loads(text)))
