"""The chat format: a conversation as pieces of a token sequence (paper 3.2; Qwen's format as in the official release).

Pictures and sizes stay placeholders here; their ids follow from the picture's layout and codes.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from illume_lightning.data.conversation import IMAGE, RESOLUTION_TAG, Conversation, Turn
from illume_lightning.data.text_tokenizer import TextTokenizer

SYSTEM = "You are a helpful assistant."
"""System turn of conversations that have none."""

GENERATE = "Generate an image of {resolution_tag}, the content of image is {caption}\n"
"""Text to image. Fill in with `str.replace`: captions may contain braces."""
EDIT = "<image>\nPlease edit the image according to the instruction: {instruction}.\n"
"""Editing; the instruction comes without a full stop."""
DESCRIBE = "<image>\nDescribe the image."
"""Captioning."""
RECONSTRUCT = "<image>\nReconstruct the image according to the given image\n"
"""Reconstruction, and the official release's unconditional prompt of editing."""
RANDOM = "Generate a random image of {resolution_tag}\n"
"""The official release's unconditional prompt of text to image."""

_BLANK = re.compile(r"\{caption\}|\{instruction\}")
_PLACEHOLDER = re.compile(f"({re.escape(IMAGE)}|{re.escape(RESOLUTION_TAG)})")


class Piece(NamedTuple):
    """A stretch of the sequence."""

    kind: Literal["text", "size", "input", "target"]
    """Text; height and width of an image; an image to look at; an image to generate."""

    ids: tuple[int, ...]
    """Of text; the other kinds have none yet."""

    image: int
    """Which image, in order of appearance from 0; -1 for text."""

    is_supervised: bool
    """Whether it is learned: what the assistant says, to the end of its turn."""


class Unconditional(NamedTuple):
    """A conversation for the unconditional branch of guidance."""

    conversation: Conversation
    """Turns to render."""

    images: tuple[int, ...]
    """For each image of it, the number of the original conversation's image that stands there."""


def filled(template: str, text: str) -> str | None:
    """What stands in a template's only blank; none if the text was not made from it, or nothing or a picture stands."""
    before, after = _BLANK.split(template)
    if not (text.startswith(before) and text.endswith(after)):
        return None
    words = text[len(before) : len(text) - len(after)].strip()
    return None if not words or _PLACEHOLDER.search(words) else words


def render(conversation: Conversation, tokenizer: TextTokenizer) -> list[Piece]:
    """The sequence of a conversation.

    An image to generate follows its size. Where a conversation has one, images to look at follow theirs too;
    elsewhere they come without (paper 3.2). Text is cut at images, sizes and ends of turns, and each part is
    tokenised on its own, as in the official release; there, however, an answer is tokenised together with the
    line break before it. Here it is not, so that training has the prompts of generation whatever the answer.

    Raises:
        ValueError: if a system turn is not the first, or no image to generate follows a resolution tag.
    """
    return _joined(piece for turn in _turns(conversation, tokenizer) for piece in turn)


def prompt(conversation: Conversation, tokenizer: TextTokenizer) -> list[Piece]:
    """The sequence of a conversation up to its last answer, which is to be generated: the start of `render`'s.

    Args:
        conversation: ends with the assistant's turn to come. Of its text only the images count, for they decide
            about sizes: `Turn("assistant", "")` asks for words, `Turn("assistant", IMAGE)` for a picture.
        tokenizer: of text.

    Raises:
        ValueError: if the last turn is not the assistant's, and as `render` does.
    """
    if not conversation.turns or conversation.turns[-1].role != "assistant":
        raise ValueError(
            "a prompt ends with the answer to come: add a turn of the assistant, empty for an answer in words, "
            f"'{IMAGE}' for a picture"
        )
    *history, (opening, *_) = _turns(conversation, tokenizer)
    return _joined(piece for turn in (*history, [opening]) for piece in turn)


def unconditional(conversation: Conversation, release_prompts: bool) -> Unconditional:
    """What guidance contrasts a conversation with.

    Args:
        conversation: one that has images to generate.
        release_prompts: the official release's prompts in place of the paper's masked text (section 3.2): a
            random image for text to image; for editing the reconstruction of the source, which then is the
            target. They exist for one request with at most one image that is answered by one image; other
            conversations are masked.
    """
    system = [turn for turn in conversation.turns if turn.role == "system"]
    roles = [turn.role for turn in conversation.turns[len(system) :]]
    if release_prompts and roles == ["user", "assistant"]:
        answer = conversation.turns[-1]
        if conversation.is_target == (True,):
            return Unconditional(Conversation((*system, Turn("user", RANDOM), answer)), (0,))
        if conversation.is_target == (False, True):
            return Unconditional(Conversation((*system, Turn("user", RECONSTRUCT), answer)), (0, 0))
    return Unconditional(conversation.without_condition(), tuple(range(len(conversation.is_target))))


def _turns(conversation: Conversation, tokenizer: TextTokenizer) -> list[list[Piece]]:
    """Pieces of every turn; an assistant's first is the opening, which is not learned."""
    turns = conversation.turns
    if not turns or turns[0].role != "system":
        turns = (Turn("system", SYSTEM), *turns)
    if any(turn.role == "system" for turn in turns[1:]):
        raise ValueError("a system turn is not the first of its conversation; put it there, or leave it out")
    rendered, image = [], 0
    for turn in turns:
        rendered.append(list(_pieces(turn, image, conversation.is_target, tokenizer)))
        image += turn.text.count(IMAGE)
    return rendered


def _pieces(turn: Turn, image: int, is_target: Sequence[bool], tokenizer: TextTokenizer) -> Iterator[Piece]:
    """Pieces of a turn whose first image has the number `image`."""
    is_answer = turn.role == "assistant"
    opening, content = (f"{turn.role}\n", turn.text) if is_answer else ("", f"{turn.role}\n{turn.text}")
    yield _text([tokenizer.start_of_turn, *tokenizer.encode(opening)], False)
    for part in _PLACEHOLDER.split(content):
        if part == IMAGE:
            if any(is_target):
                yield Piece("size", (), image, is_answer)
            yield Piece("target" if is_answer else "input", (), image, is_answer)
            image += 1
        elif part == RESOLUTION_TAG:
            yield Piece("size", (), _next_target(is_target, image), is_answer)
        else:
            yield _text(tokenizer.encode(part), is_answer)
    yield _text([tokenizer.end_of_turn, *tokenizer.encode("\n")], is_answer)


def _next_target(is_target: Sequence[bool], image: int) -> int:
    """Number of the first image to generate from `image` on."""
    for number in range(image, len(is_target)):
        if is_target[number]:
            return number
    raise ValueError(
        f"no image to generate follows a {RESOLUTION_TAG}; answer it with '{IMAGE}', or leave the tag out"
    )


def _text(ids: Sequence[int], is_supervised: bool) -> Piece:
    return Piece("text", tuple(ids), -1, is_supervised)


def _joined(pieces: Iterable[Piece]) -> list[Piece]:
    """The same with neighbouring texts in one piece, and none empty."""
    joined: list[Piece] = []
    for piece in pieces:
        if piece.kind == "text" and joined and joined[-1]._replace(ids=piece.ids) == piece:
            joined[-1] = piece._replace(ids=joined[-1].ids + piece.ids)
        elif piece.kind != "text" or piece.ids:
            joined.append(piece)
    return joined
