"""Token ids of the unified vocabulary: text, then markers, sizes, semantic codes and pixel codes (paper 3.2).

All ids follow from the number of text tokens and the two codebook sizes; for Qwen2.5 and the full-size DualViTok
they are the published ones. Standard library only.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from illume_lightning.resolution import Size

MARKERS = (
    "<start_of_image>",
    "<end_of_image>",
    "<end_of_line>",
    "<start_of_level0>",
    "<end_of_level0>",
    "<start_of_level1>",
    "<end_of_level1>",
)
"""Published strings of the markers, in the order of their ids; level 0 is semantic, level 1 pixel."""


@dataclass(frozen=True)
class Vocabulary:
    """Where every kind of token has its ids: ``num_text`` of text first, then those of vision.

    Raises:
        ValueError: if a count is not positive, or ``num_unused`` is negative.
    """

    num_text: int = 151_665
    """Text tokens, ids from 0: the length of the text tokenizer."""

    semantic_codes: int = 32_768
    """Size of the semantic codebook."""

    pixel_codes: int = 98_304
    """Size of the pixel codebook."""

    size_step: int = 64
    """Heights and widths that have a token are multiples of this many pixels."""

    num_sizes: int = 16
    """Heights that have a token, and as many widths."""

    num_unused: int = 0
    """Rows at the end that stand for nothing. Published tables have some (Qwen2.5-3B: 271), and they take part in
    the softmax."""

    pixel_first: bool = False
    """Pixel rows stand before semantic ones in a picture: fine to coarse, against the paper. Ids are the same."""

    def __post_init__(self) -> None:
        for name in ("num_text", "semantic_codes", "pixel_codes", "size_step", "num_sizes"):
            if getattr(self, name) < 1:
                raise ValueError(f"vocabulary: {name} is {getattr(self, name)}, it must be at least 1")
        if self.num_unused < 0:
            raise ValueError(f"vocabulary: num_unused is {self.num_unused}, it must not be negative")

    @property
    def start_of_image(self) -> int:
        """First id of vision."""
        return self.num_text

    @property
    def end_of_image(self) -> int:
        """Closes an image."""
        return self.num_text + 1

    @property
    def end_of_line(self) -> int:
        """Closes a row of codes."""
        return self.num_text + 2

    @property
    def start_of_semantic(self) -> int:
        """Opens the semantic grid."""
        return self.num_text + 3

    @property
    def end_of_semantic(self) -> int:
        """Closes the semantic grid."""
        return self.num_text + 4

    @property
    def start_of_pixel(self) -> int:
        """Opens the pixel grid."""
        return self.num_text + 5

    @property
    def end_of_pixel(self) -> int:
        """Closes the pixel grid."""
        return self.num_text + 6

    @property
    def height_ids(self) -> range:
        """Of the heights, rising."""
        start = self.num_text + len(MARKERS)
        return range(start, start + self.num_sizes)

    @property
    def width_ids(self) -> range:
        """Of the widths, rising."""
        return range(self.height_ids.stop, self.height_ids.stop + self.num_sizes)

    @property
    def semantic_ids(self) -> range:
        """Of the semantic codes."""
        return range(self.width_ids.stop, self.width_ids.stop + self.semantic_codes)

    @property
    def pixel_ids(self) -> range:
        """Of the pixel codes."""
        return range(self.semantic_ids.stop, self.semantic_ids.stop + self.pixel_codes)

    @property
    def num_vision(self) -> int:
        """Rows of the vision tables, with the unused ones."""
        return self.size - self.num_text

    @property
    def size(self) -> int:
        """All ids, with the unused ones."""
        return self.pixel_ids.stop + self.num_unused

    def size_tokens(self, size: Size) -> tuple[int, int]:
        """Ids of a picture's height and width.

        Raises:
            ValueError: if one of them has no token.
        """
        found = [length // self.size_step for length in size]
        for length, number in zip(size, found, strict=True):
            if length % self.size_step or not 1 <= number <= self.num_sizes:
                raise ValueError(
                    f"picture size {size[0]} x {size[1]} (height x width): {length} has no token; the vocabulary has "
                    f"multiples of {self.size_step} up to {self.size_step * self.num_sizes} pixels"
                )
        return self.height_ids[found[0] - 1], self.width_ids[found[1] - 1]

    def size_of(self, height: int, width: int) -> Size:
        """Height and width in pixels of two size tokens: the inverse of ``size_tokens``.

        Raises:
            ValueError: if they are none.
        """
        if height not in self.height_ids or width not in self.width_ids:
            raise ValueError(f"ids {height} and {width} are not a height and a width")
        sides = height - self.height_ids.start + 1, width - self.width_ids.start + 1
        return sides[0] * self.size_step, sides[1] * self.size_step

    def tokens(self) -> Iterator[str]:
        """Published strings of the vision tokens, in the order of their ids; unused rows have none."""
        yield from MARKERS
        for name in ("height", "width"):
            for number in range(1, self.num_sizes + 1):
                yield f"<{name}_{number * self.size_step}>"
        for level, count in enumerate((self.semantic_codes, self.pixel_codes)):
            for code in range(count):
                yield f"<|image_level{level}_{code}|>"
