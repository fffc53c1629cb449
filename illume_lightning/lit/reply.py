"""What the model answers: texts and pictures in order, as they come and as a whole."""

from typing import Any, NamedTuple

from PIL import Image

from illume_lightning.lit.prompts import MadeImage


class Reply(NamedTuple):
    """An answer.

    Args:
        parts: texts and pictures in order.
    """

    parts: tuple[str | MadeImage, ...]

    @property
    def text(self) -> str:
        """All words of it."""
        return "".join(part for part in self.parts if isinstance(part, str)).strip()

    @property
    def images(self) -> list[Image.Image]:
        """All pictures of it."""
        return [part.image for part in self.parts if isinstance(part, MadeImage)]

    @property
    def message(self) -> dict[str, Any]:
        """The answer as a message, to go on with the conversation; its pictures keep their codes."""
        content: list[dict[str, Any]] = []
        for part in self.parts:
            kind = "text" if isinstance(part, str) else "image"
            content.append({"type": kind, kind: part})
        return {"role": "assistant", "content": content}


class Event(NamedTuple):
    """News of one of several tasks."""

    number: int
    """Of the task, in the order in which tasks came."""

    text: str
    """New words."""

    picture: float
    """Share of the picture under way that is there, 0 to 1."""

    reply: Reply | None
    """The whole answer, with the task's last event."""
