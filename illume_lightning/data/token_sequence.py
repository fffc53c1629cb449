"""One conversation as tokens: ids, what is predicted, and where the cells of its images stand."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from illume_lightning.data.chat import Piece
from illume_lightning.data.packing import SizedImage
from illume_lightning.image_layout import image_layout
from illume_lightning.resolution import Size
from illume_lightning.vocabulary import Vocabulary

TEXT, SEMANTIC, PIXEL, MARKER = range(4)
SEGMENTS = ("text", "semantic", "pixel", "marker")
"""Kinds of tokens, by number; markers are an image's, with its size."""

Codes = tuple[np.ndarray, np.ndarray]
"""Semantic and pixel codes of an image, row by row."""


class Cells(NamedTuple):
    """Where an image of a conversation stands.

    Args:
        image: number of the image in the conversation.
        size: that it is brought to, and how.
        semantic: (h1 w1,), positions of the semantic cells.
        pixel: (h2 w2,), positions of the pixel cells.
    """

    image: int
    size: SizedImage
    semantic: np.ndarray
    pixel: np.ndarray


class TokenSequence(NamedTuple):
    """A conversation of L tokens.

    Args:
        ids: int64 (L,); code 0 in the cells of images that are input, or yet to be tokenised.
        segments: int64 (L,), numbers in `SEGMENTS`.
        is_supervised: bool (L,), whether the token is predicted.
        slots: int64 (L,), as `ImageLayout.slot_ids`, 0 outside of images.
        inputs: images whose cells take continuous features.
        targets: images whose cells are yet to take codes.
    """

    ids: np.ndarray
    segments: np.ndarray
    is_supervised: np.ndarray
    slots: np.ndarray
    inputs: list[Cells]
    targets: list[Cells]


def token_sequence(
    pieces: Sequence[Piece],
    sizes: Sequence[SizedImage],
    vocabulary: Vocabulary,
    codes: Callable[[int], Codes | None],
    shown: Sequence[int],
    discrete_input: bool = False,
) -> TokenSequence:
    """Put the pieces of a rendered conversation together.

    Args:
        pieces: of the conversation.
        sizes: of its images, in order.
        vocabulary: of the model.
        codes: of an image by its number, or none where they are yet to be made.
        shown: number of the image, in `sizes` and `codes`, that stands for each image of the pieces.
        discrete_input: images that are input take their codes too, where they are known.

    Raises:
        ValueError: if codes don't fit the image's size.
    """
    parts: list[_Part] = []
    inputs: list[Cells] = []
    targets: list[Cells] = []
    length = 0
    for piece in pieces:
        image = shown[piece.image] if piece.image >= 0 else -1
        if piece.kind == "text":
            part = _text(piece.ids, piece.is_supervised)
        elif piece.kind == "size":
            part = _size(sizes[image].size, vocabulary, piece.is_supervised)
        else:
            layout = _arrays(sizes[image].size, vocabulary)
            known = codes(image) if discrete_input or piece.kind == "target" else None
            part = _image(layout, known, vocabulary, piece.is_supervised)
            cells = Cells(image, sizes[image], layout.semantic + length, layout.pixel + length)
            if known is None:
                (inputs if piece.kind == "input" else targets).append(cells)
        parts.append(part)
        length += len(part.ids)
    ids, segments, is_supervised, slots = (np.concatenate(column) for column in zip(*parts, strict=True))
    return TokenSequence(ids, segments, is_supervised, slots, inputs, targets)


class _Part(NamedTuple):
    ids: np.ndarray
    segments: np.ndarray
    is_supervised: np.ndarray
    slots: np.ndarray


def _text(ids: Sequence[int], is_supervised: bool) -> _Part:
    return _uniform(np.array(ids, dtype=np.int64), TEXT, is_supervised)


def _size(size: Size, vocabulary: Vocabulary, is_supervised: bool) -> _Part:
    return _uniform(np.array(vocabulary.size_tokens(size), dtype=np.int64), MARKER, is_supervised)


def _uniform(ids: np.ndarray, segment: int, is_supervised: bool) -> _Part:
    zeros = np.zeros(len(ids), dtype=np.int64)
    return _Part(ids, zeros + segment, np.full(len(ids), is_supervised), zeros)


class _Layout(NamedTuple):
    template: np.ndarray
    slots: np.ndarray
    segments: np.ndarray
    semantic: np.ndarray
    pixel: np.ndarray


@lru_cache(maxsize=512)
def _arrays(size: Size, vocabulary: Vocabulary) -> _Layout:
    layout = image_layout(size, vocabulary)
    semantic, pixel = np.array(layout.semantic_slots), np.array(layout.pixel_slots)
    segments = np.full(layout.length, MARKER, dtype=np.int64)
    segments[semantic], segments[pixel] = SEMANTIC, PIXEL
    template, slots = np.array(layout.template), np.array(layout.slot_ids)
    return _Layout(template, slots, segments, semantic, pixel)


def _image(layout: _Layout, codes: Codes | None, vocabulary: Vocabulary, is_supervised: bool) -> _Part:
    ids = layout.template
    if codes is not None:
        ids = ids.copy()
        ids[layout.semantic] = codes[0] + vocabulary.semantic_ids.start
        ids[layout.pixel] = codes[1] + vocabulary.pixel_ids.start
    return _Part(ids, layout.segments, np.full(len(ids), is_supervised), layout.slots)
