"""Which ids may come next in a generated answer (paper 3.2): words, and pictures that can't be malformed.

Standard library only.
"""

from collections.abc import Iterable

from illume_lightning.image_layout import ImageLayout, image_layout
from illume_lightning.resolution import Size
from illume_lightning.vocabulary import Vocabulary


class Grammar:
    """State of one answer as it grows.

    Outside of pictures come words, or the height of a picture; after a height a width, after a width the picture
    from its start to its end, of exactly that size. In the official release the size is given beforehand and its
    tokens mean nothing: heights, widths and the start of a picture may stand anywhere in the text, as may the end of
    one and rows that stand for nothing.

    Args:
        vocabulary: of the model.
        layout: the answer is one picture of this layout and ends with it; its size stands in the prompt. With
            ``release``, the layout of every picture.
        sizes: of pictures that may come within the text, by default none.
        release: the official release's rules for text; needs a layout.

    Raises:
        ValueError: if one of the sizes has no tokens or no grid.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        layout: ImageLayout | None = None,
        sizes: Iterable[Size] = (),
        release: bool = False,
    ) -> None:
        self.vocabulary = vocabulary
        self.layout = layout
        """Of the latest picture; none before the first."""
        self.words_only = False
        """Set where there is no room for another picture."""
        self.is_finished = False
        """Whether nothing may follow: the only picture is complete."""
        self._is_only_picture = layout is not None and not release
        self.position: int | None = 0 if self._is_only_picture else None
        """Place within the picture of the next id; none outside of pictures."""
        self._release = release
        self._layouts: dict[int, dict[int, ImageLayout]] = {}
        self._height: int | None = None
        for size in sorted(sizes):
            height, width = vocabulary.size_tokens(size)
            self._layouts.setdefault(height, {})[width] = image_layout(size, vocabulary)

    @property
    def in_picture(self) -> bool:
        """Whether the next id is a picture's, its start included."""
        return self.position is not None

    @property
    def allowed(self) -> tuple[range, ...]:
        """Ids that may come next, in rising ranges that don't overlap; none after the end."""
        if self.is_finished:
            return ()
        if self.position is not None:
            assert self.layout is not None
            return (self.layout.allowed[self.position],)
        if self._height is not None:
            return tuple(map(_only, self._layouts[self._height]))
        if self._release:
            return self._release_text()
        return (range(self.vocabulary.num_text), *(() if self.words_only else map(_only, self._layouts)))

    @property
    def forced(self) -> int | None:
        """The id that must come next, where there is but one."""
        allowed = self.allowed
        return allowed[0].start if len(allowed) == 1 and len(allowed[0]) == 1 else None

    def advance(self, id: int | None) -> None:
        """Take the next id.

        Args:
            id: within a picture, none stands for any that is allowed: what follows does not depend on it.

        Raises:
            ValueError: if it is not allowed here.
        """
        if id is None:
            assert self.in_picture
        elif not any(id in ids for ids in self.allowed):
            raise ValueError(
                f"id {id} can't stand here: allowed are {', '.join(map(_name, self.allowed)) or 'none'}"
            )
        if self.position is not None:
            assert self.layout is not None
            self.position += 1
            if self.position == self.layout.length:
                self.position, self.is_finished = None, self._is_only_picture
        elif self._height is not None:
            assert id is not None
            self.layout, self.position, self._height = self._layouts[self._height][id], 0, None
        elif self._release:
            self.position = 1 if id == self.vocabulary.start_of_image else None
        elif id in self._layouts:
            self._height = id

    def _release_text(self) -> tuple[range, ...]:
        vocabulary = self.vocabulary
        ranges = (
            range(vocabulary.end_of_line),
            range(vocabulary.height_ids.start, vocabulary.width_ids.stop),
            range(vocabulary.pixel_ids.stop, vocabulary.size),
        )
        return tuple(ids for ids in ranges if ids)


def _only(id: int) -> range:
    return range(id, id + 1)


def _name(ids: range) -> str:
    return f"{ids.start}" if len(ids) == 1 else f"{ids.start} to {ids.stop - 1}"
