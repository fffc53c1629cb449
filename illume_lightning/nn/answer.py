"""One answer of the MLLM: what is asked, what has come so far, and what must come next."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from illume_lightning.grammar import Grammar
from illume_lightning.image_layout import ImageLayout, image_layout
from illume_lightning.nn.token_sampling import SegmentSampling, TokenSampling
from illume_lightning.resolution import Size
from illume_lightning.vocabulary import Vocabulary

_NUM_SIZE_TOKENS = 2


@dataclass(frozen=True)
class Prompt:
    """What an answer follows: L tokens, of which some hold features of pictures.

    Args:
        ids: (L,); any id in the places of features. The last is a token.
        slot_ids: (L,) as ``ImageLayout.slot_ids``, 0 outside of pictures.
        images: (1, 3, H, W) in [-1, 1] each.
        semantic_slots: places of the semantic features, in the pictures' order.
        pixel_slots: places of the pixel features, in the pictures' order.
    """

    ids: Sequence[int]
    slot_ids: Sequence[int]
    images: Sequence[Tensor] = ()
    semantic_slots: Sequence[int] = ()
    pixel_slots: Sequence[int] = ()


@dataclass(frozen=True)
class Request:
    """One answer to write.

    Args:
        prompt: to answer.
        max_tokens: most tokens of the answer; a picture within the text begins only where all of it fits. Not
            used where the answer is one picture.
        layout: the answer is one picture of this layout; the prompt ends with its size.
        sizes: of pictures that may come within the text.
        unconditional: the prompt without its condition, for guidance; without it there is none.
        sampling: how tokens are drawn.
        seed: of the drawing.
    """

    prompt: Prompt
    max_tokens: int = 1024
    layout: ImageLayout | None = None
    sizes: Sequence[Size] = ()
    unconditional: Prompt | None = None
    sampling: TokenSampling = field(default_factory=TokenSampling)
    seed: int = 0

    @property
    def budget(self) -> int:
        """Most tokens of the answer."""
        return self.max_tokens if self.layout is None else self.layout.length

    @property
    def is_guided(self) -> bool:
        """Whether a second sequence runs beside it."""
        can_show = self.layout is not None or bool(self.sizes)
        return can_show and self.unconditional is not None and self.sampling.guidance != 1


class Update(NamedTuple):
    """What has become of an answer."""

    number: int
    """Of the request, in the order in which requests came."""

    ids: list[int]
    """Of the answer, new since its last update; those of a picture come when it is complete."""

    picture: float
    """Share of the picture under way that is there, 0 to 1; 0 outside of pictures."""

    is_finished: bool
    """Whether this is the last update."""


class Answer:
    """An answer as it grows, and its one or two sequences."""

    def __init__(self, number: int, request: Request, vocabulary: Vocabulary, device: torch.device) -> None:
        self.number, self.request = number, request
        self.grammar = Grammar(vocabulary, request.layout, request.sizes)
        self.slots: list[int] = []
        self.lengths = [len(request.prompt.ids) - 1]
        """Tokens that each sequence has seen."""
        self.ids: list[int | None] = []
        """Of the answer; none where the id has not been read from the device."""
        self.slot_ids: list[int] = []
        self.pending: list[int | None] = [request.prompt.ids[-1]]
        """What the next pass feeds."""
        self.pending_slot_ids = [request.prompt.slot_ids[-1]]
        generator = torch.Generator().manual_seed(request.seed)
        self.uniforms = torch.rand(request.budget, generator=generator, dtype=torch.float32).to(device)
        self.latest = torch.empty(0)
        self.is_finished = False
        self._unread: list[Tensor] = []
        self._reported = 0
        largest = max((image_layout(size, vocabulary).length for size in request.sizes), default=0)
        self._room_for_picture = largest + _NUM_SIZE_TOKENS
        self._follow()

    @property
    def sampling(self) -> SegmentSampling:
        """Settings of the next token."""
        settings = self.request.sampling
        if not self.grammar.in_picture:
            return settings.text
        is_semantic = self.grammar.allowed == (self.grammar.vocabulary.semantic_ids,)
        return settings.semantic if is_semantic else settings.pixel

    @property
    def wants_guidance(self) -> bool:
        """Whether a sequence without the condition is needed now."""
        return self.request.is_guided and self.grammar.in_picture and not self.is_finished

    def take(self, drawn: Tensor, read: int | None, end_ids: frozenset[int]) -> None:
        """Go on by a drawn id: ``read`` where it has been read from the device."""
        self.pending, self.pending_slot_ids = [], []
        if read in end_ids and not self.grammar.in_picture:
            self.is_finished = True
            return
        self.latest = drawn
        if read is None:
            self._unread.append(drawn)
        self._append(read)
        self._follow()

    def _append(self, id: int | None) -> None:
        position, layout = self.grammar.position, self.grammar.layout
        slot_id = layout.slot_ids[position] if position is not None and layout is not None else 0
        self.ids.append(id)
        self.pending.append(id)
        self.slot_ids.append(slot_id)
        self.pending_slot_ids.append(slot_id)
        self.grammar.advance(id)

    def _follow(self) -> None:
        """Append what must come next, up to the next choice or the end."""
        while (forced := self.grammar.forced) is not None:
            self._append(forced)
        room = self.request.budget - len(self.ids)
        self.grammar.words_only = room < self._room_for_picture
        self.is_finished = self.grammar.is_finished or room <= 0

    def unconditional_prefix(self) -> Prompt:
        """What the sequence without condition has to see before the next pass."""
        prompt = self.request.unconditional
        assert prompt is not None
        whole = replace(prompt, ids=[*prompt.ids, *self._read()], slot_ids=[*prompt.slot_ids, *self.slot_ids])
        return without_last(whole, len(self.pending))

    def update(self) -> Update | None:
        """What is new, if it is worth telling: words, a line of a picture, the end."""
        grammar, layout = self.grammar, self.grammar.layout
        if grammar.position is not None and layout is not None and not self.is_finished:
            is_line = grammar.vocabulary.end_of_line in self.pending
            return Update(self.number, [], grammar.position / layout.length, False) if is_line else None
        new = self._read()[self._reported :]
        self._reported = len(self.ids)
        return Update(self.number, new, 0.0, self.is_finished) if new or self.is_finished else None

    def _read(self) -> list[int]:
        """All ids of the answer; drawn ones are read from the device."""
        read = iter(torch.stack(self._unread).tolist() if self._unread else ())
        self._unread = []
        ids = [next(read) if id is None else id for id in self.ids]
        self.ids = [*ids]
        return ids


def without_last(prompt: Prompt, count: int) -> Prompt:
    """A prompt without its last tokens, none of which hold features."""
    return replace(prompt, ids=prompt.ids[:-count], slot_ids=prompt.slot_ids[:-count])
