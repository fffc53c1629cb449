"""How a picture stands in a token sequence (paper 3.2): one description for ids, feature slots and decoding.

Standard library only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from illume_lightning.resolution import PIXEL_STRIDE, Grids, Size, grids
from illume_lightning.vocabulary import Vocabulary

SLOT_STEPS = 64
"""Places of cells are told apart in this many steps of the height and of the width: the largest grid's."""
NUM_SLOTS = 2 * SLOT_STEPS**2
"""Slots of both branches, numbered from 1."""


@dataclass(frozen=True)
class ImageLayout:
    """The tokens of one picture, from start of image to end of image.

    Semantic rows first, then pixel rows, unless the vocabulary says otherwise; each row is closed by an end of line.
    Where a picture is input, its cells hold continuous features instead of codes; the markers are the same.
    ``image_layout`` makes it for a size.
    """

    grids: Grids
    """Rows and columns of both code grids."""

    vocabulary: Vocabulary

    @property
    def height(self) -> int:
        """Of the picture that the codes stand for, in pixels."""
        return self.grids.pixel[0] * PIXEL_STRIDE

    @property
    def width(self) -> int:
        """Of the picture that the codes stand for, in pixels."""
        return self.grids.pixel[1] * PIXEL_STRIDE

    @cached_property
    def allowed(self) -> tuple[range, ...]:
        """Ids that may stand at every position: one marker, or all codes of a branch. The decoding grammar."""
        vocabulary = self.vocabulary
        only = {name: _only(getattr(vocabulary, name)) for name in _MARKER_NAMES}
        positions = [only["start_of_image"]]
        branches = [("semantic", vocabulary.semantic_ids), ("pixel", vocabulary.pixel_ids)]
        for branch, codes in reversed(branches) if vocabulary.pixel_first else branches:
            rows, columns = getattr(self.grids, branch)
            positions.append(only[f"start_of_{branch}"])
            positions.extend(([codes] * columns + [only["end_of_line"]]) * rows)
            positions.append(only[f"end_of_{branch}"])
        positions.append(only["end_of_image"])
        return tuple(positions)

    @property
    def length(self) -> int:
        """Tokens from start to end of image; the two size tokens come on top."""
        return len(self.allowed)

    @property
    def size_tokens(self) -> tuple[int, int]:
        """Ids of height and width, which stand before an image that is generated or edited.

        Raises:
            ValueError: if the size has no tokens.
        """
        return self.vocabulary.size_tokens((self.height, self.width))

    @cached_property
    def semantic_slots(self) -> tuple[int, ...]:
        """Positions of the semantic grid's cells, row by row."""
        return self._slots(self.vocabulary.semantic_ids)

    @cached_property
    def pixel_slots(self) -> tuple[int, ...]:
        """Positions of the pixel grid's cells, row by row."""
        return self._slots(self.vocabulary.pixel_ids)

    @cached_property
    def slot_ids(self) -> tuple[int, ...]:
        """Where in the picture every position stands, in shares of its sides: equal at all sizes.

        A cell has the slot of its centre, the end of a line that of the line's right edge; other markers have 0.
        """
        vocabulary, slots = self.vocabulary, [0] * self.length
        for branch, name in enumerate(("semantic", "pixel")):
            rows, columns = getattr(self.grids, name)
            position = self.allowed.index(_only(getattr(vocabulary, f"start_of_{name}")))
            across = [
                *((2 * column + 1) * SLOT_STEPS // (2 * columns) for column in range(columns)),
                SLOT_STEPS - 1,
            ]
            for row in range(rows):
                down = (2 * row + 1) * SLOT_STEPS // (2 * rows)
                for step in across:
                    position += 1
                    slots[position] = 1 + (branch * SLOT_STEPS + down) * SLOT_STEPS + step
        return tuple(slots)

    @cached_property
    def template(self) -> tuple[int, ...]:
        """Ids with code 0 in every cell."""
        return tuple(ids.start for ids in self.allowed)

    def ids(self, semantic: Sequence[int], pixel: Sequence[int]) -> list[int]:
        """Ids of a picture.

        Args:
            semantic: codes, row by row.
            pixel: codes, row by row.

        Raises:
            ValueError: if there are too few or too many codes, or a codebook has no such code.
        """
        ids = list(self.template)
        for name, codes, slots, kind in (
            ("semantic", semantic, self.semantic_slots, self.vocabulary.semantic_ids),
            ("pixel", pixel, self.pixel_slots, self.vocabulary.pixel_ids),
        ):
            if len(codes) != len(slots):
                rows, columns = getattr(self.grids, name)
                raise ValueError(
                    f"{len(codes)} {name} codes for a picture of {self.height} x {self.width} (height x width), "
                    f"which has {rows} x {columns} = {len(slots)}"
                )
            for slot, code in zip(slots, codes, strict=True):
                if not 0 <= code < len(kind):
                    raise ValueError(f"{name} code {code} is none of the codebook's {len(kind)}")
                ids[slot] = kind[code]
        return ids

    def codes(self, ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """Semantic and pixel codes, row by row: the inverse of `ids`.

        Raises:
            ValueError: if the ids break the grammar; names the first place.
        """
        if len(ids) != self.length:
            raise ValueError(
                f"{len(ids)} ids for a picture of {self.height} x {self.width} (height x width), "
                f"which has {self.length}"
            )
        for position, (token, allowed) in enumerate(zip(ids, self.allowed, strict=True)):
            if token not in allowed:
                raise ValueError(f"id {token} at position {position}: only {_name(allowed)} may stand there")
        return (
            [ids[slot] - self.vocabulary.semantic_ids.start for slot in self.semantic_slots],
            [ids[slot] - self.vocabulary.pixel_ids.start for slot in self.pixel_slots],
        )

    def _slots(self, kind: range) -> tuple[int, ...]:
        return tuple(position for position, ids in enumerate(self.allowed) if ids == kind)


_MARKER_NAMES = (
    "start_of_image",
    "end_of_image",
    "end_of_line",
    "start_of_semantic",
    "end_of_semantic",
    "start_of_pixel",
    "end_of_pixel",
)


@lru_cache(maxsize=512)
def image_layout(size: Size, vocabulary: Vocabulary) -> ImageLayout:
    """The layout of a size (height, width); made once.

    Raises:
        ValueError: if a side is not a multiple of 16.
    """
    return ImageLayout(grids(*size), vocabulary)


def _only(token: int) -> range:
    return range(token, token + 1)


def _name(ids: range) -> str:
    return f"{ids.start}" if len(ids) == 1 else f"{ids.start} to {ids.stop - 1}"
