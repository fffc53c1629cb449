"""A conversation as one user sees it: questions, answers as they grow, and what the model is told of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from illume_lightning.lit.prompts import MadeImage

MAX_CHARACTERS = 4000
"""Of a message, a prompt or an instruction."""

MAX_PICTURES = 8
"""Of a message."""

MAX_EXCHANGES = 64
"""Of a conversation, whose pictures stay in memory as long as its page is open."""


def check_length(text: str) -> None:
    """Refuse a text that is too long, before any work on it; browsers alone don't hold to a limit.

    Raises:
        ValueError: names both lengths.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(
            f"the text has {len(text):,} characters: {MAX_CHARACTERS:,} is the most, so shorten it"
        )


@dataclass
class Exchange:
    """A question and its answer."""

    text: str
    """What the user says."""

    images: tuple[Image.Image, ...] = ()
    """What the user shows, RGB."""

    answer: tuple[str | MadeImage, ...] = ()
    """Texts and pictures in order; empty as long as there is none."""

    attempts: int = 0
    """Answers that were thrown away for another."""


@dataclass
class History:
    """Exchanges in order; only the last may be without an answer."""

    exchanges: list[Exchange] = field(default_factory=list)

    is_growing: bool = False
    """Whether the last answer is being written; nothing else can be asked then."""

    def ask(self, text: str, images: Sequence[Image.Image] = ()) -> None:
        """Add a question; one before it that was never answered goes.

        Raises:
            ValueError: if there is nothing or too much in it or before it, or an answer is being written.
        """
        self._check_idle()
        check_length(text)
        if len(images) > MAX_PICTURES:
            raise ValueError(
                f"the message has {len(images)} pictures: {MAX_PICTURES} is the most, so leave some out"
            )
        if len(self.exchanges) >= MAX_EXCHANGES:
            raise ValueError(f"the conversation has {MAX_EXCHANGES} questions, which is the most: clear it")
        if not text.strip() and not images:
            raise ValueError("the message is empty: write something, or add a picture")
        if self.exchanges and not self.exchanges[-1].answer:
            self.exchanges.pop()
        self.exchanges.append(Exchange(text.strip(), tuple(images)))

    def ask_again(self) -> None:
        """Throw the last answer away, for another of the same question.

        Raises:
            ValueError: if there is no question, or an answer is being written.
        """
        self._check_idle()
        if not self.exchanges:
            raise ValueError("there is no question yet to answer again")
        last = self.exchanges[-1]
        last.attempts += bool(last.answer)
        last.answer = ()

    def _check_idle(self) -> None:
        if self.is_growing:
            raise ValueError("an answer is being written: wait for it, or cancel it")

    @property
    def messages(self) -> list[dict[str, Any]]:
        """What the model is told, as ``Chat`` takes it; pictures that it made keep their codes."""
        messages = []
        for exchange in self.exchanges:
            messages.append(_message("user", [*exchange.images, *([exchange.text] if exchange.text else [])]))
            if exchange.answer:
                messages.append(_message("assistant", exchange.answer))
        return messages


def _message(role: str, parts: Sequence[str | Image.Image | MadeImage]) -> dict[str, Any]:
    content = []
    for part in parts:
        kind = "text" if isinstance(part, str) else "image"
        content.append({"type": kind, kind: part})
    return {"role": role, "content": content}
