"""What the conversations of all worlds share: the tasks, how each is said, and a text tokenizer of their words."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, get_args

from illume_lightning.data.chat import DESCRIBE, EDIT, GENERATE, RANDOM, RECONSTRUCT, SYSTEM
from illume_lightning.data.conversation import IMAGE, RESOLUTION_TAG, Conversation, Turn
from illume_lightning.data.part import write_text
from illume_lightning.data.text_tokenizer import FILE, TextTokenizer, train_tokenizer

WorldTask = Literal["reconstruction", "captioning", "generation", "understanding", "editing", "text"]
"""Two of them, "understanding" and "text", are questions: about a picture, or about its caption without it."""


def check_task(task: str) -> None:
    """Refuse a task that there is not.

    Raises:
        ValueError: names those that there are.
    """
    if task not in get_args(WorldTask):
        raise ValueError(f"task is '{task}'; it must be one of {', '.join(get_args(WorldTask))}")


def picture_conversation(task: WorldTask, caption: str) -> Conversation:
    """A picture is shown or asked for: "reconstruction", "captioning" or "generation"."""
    if task == "reconstruction":
        return _exchange(RECONSTRUCT, IMAGE)
    if task == "captioning":
        return _exchange(DESCRIBE, caption)
    assert task == "generation"
    return _exchange(GENERATE.replace("{caption}", caption), IMAGE)


def edit_conversation(instruction: str) -> Conversation:
    """A picture is to be changed; the instruction comes without a full stop."""
    return _exchange(EDIT.replace("{instruction}", instruction), IMAGE)


def question_conversation(task: WorldTask, caption: str, asked: Iterable[tuple[str, str]]) -> Conversation:
    """Questions and answers in turn, "understanding" or "text"; the first follows the picture or its caption.

    Args:
        task: one of the two.
        caption: of the picture.
        asked: questions and answers, at least one.
    """
    assert task in ("understanding", "text")
    opening = f"{IMAGE}\n" if task == "understanding" else f"There is {caption}.\n"
    turns: list[Turn] = []
    for question, answer in asked:
        turns.append(Turn("user", question if turns else opening + question))
        turns.append(Turn("assistant", answer))
    return Conversation(tuple(turns))


def keep_tokenizer(output: str | Path, conversations: Iterable[Conversation], vocab_size: int) -> None:
    """Train a text tokenizer on what conversations say; the same ones always give the same.

    Args:
        output: the folder to make; gets `tokenizer.json`. One that is there already, and the same, is left alone.
        conversations: what to learn from, beside the words of the chat format.
        vocab_size: most text tokens; at least 259.

    Raises:
        ValueError: if the size is too small, or the folder has another tokenizer.
    """
    target = Path(output) / FILE
    with TemporaryDirectory() as scratch:
        made = train_tokenizer(_texts(conversations), scratch, vocab_size)
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            write_text(target, (made.folder / FILE).read_text(encoding="utf-8"))
        elif TextTokenizer(output).fingerprint != made.fingerprint:
            raise ValueError(f"{target} is another tokenizer; choose another output, or remove it")


def _texts(conversations: Iterable[Conversation]) -> Iterator[str]:
    """What is said, without placeholders."""
    chat = Conversation((Turn("system", SYSTEM), Turn("user", RANDOM), Turn("assistant", IMAGE)))
    for conversation in (chat, *conversations):
        for turn in conversation.turns:
            yield f"{turn.role}\n"
            yield from turn.text.replace(RESOLUTION_TAG, IMAGE).split(IMAGE)


def _exchange(request: str, answer: str) -> Conversation:
    return Conversation((Turn("user", request), Turn("assistant", answer)))
