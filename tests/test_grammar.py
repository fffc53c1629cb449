"""What may come next, against the official release's state machine written out again, and in conversations."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from illume_lightning.grammar import Grammar
from illume_lightning.image_layout import ImageLayout, image_layout
from illume_lightning.resolution import Grids, Size, ratio_sizes
from illume_lightning.vocabulary import Vocabulary

# Published ids.
SOI, EOI, EOL, S0, E0, S1, E1 = range(151665, 151672)
LEVELS = (range(151704, 184472), range(184472, 282776))
HEIGHTS, WIDTHS = range(151672, 151688), range(151688, 151704)
SIZES = sorted(
    {*ratio_sizes(256, 64), *ratio_sizes(512, 64), *ratio_sizes(1024, 64)}
    | {(16, 16), (32, 48), (112, 112), (512, 512), (384, 576), (1152, 768), (640, 1920)}
)
SMALL = Vocabulary(20, semantic_codes=8, pixel_codes=16, size_step=16, num_sizes=4, num_unused=3)


class Released:
    """The published state machine within a picture: counters of rows and of codes in the row."""

    def __init__(self, grids: Grids) -> None:
        self.grids = grids
        self.is_generating = False
        self.level: int | None = None
        self.last = self.rows = self.tokens = 0

    def take(self, id: int) -> None:
        self.last = id
        if id in (SOI, EOI):
            self.is_generating, self.level = id == SOI, None
        elif id in (S0, S1):
            self.level, self.rows, self.tokens = (S0, S1).index(id), 0, 0
        elif id in (E0, E1):
            self.level = None
        elif id == EOL:
            self.rows, self.tokens = self.rows + 1, 0
        else:
            self.tokens += 1

    @property
    def allowed(self) -> range:
        if self.level is None:
            only = {SOI: S0, E0: S1, E1: EOI}[self.last]
        else:
            height, width = self.grids[self.level]
            if self.rows == height:
                only = (E0, E1)[self.level]
            elif self.tokens == width:
                only = EOL
            else:
                return LEVELS[self.level]
        return range(only, only + 1)


@pytest.mark.parametrize("mode", ["only picture", "release", "conversation"])
def test_a_picture_follows_the_published_machine_at_every_size(mode: str) -> None:
    draw, vocabulary = random.Random(0), Vocabulary()
    for size in SIZES:
        layout = image_layout(size, vocabulary)
        if mode == "conversation":
            if max(size) > 1024 or any(side % 64 for side in size):
                continue
            grammar = Grammar(vocabulary, sizes=[size])
            for id in vocabulary.size_tokens(size):
                grammar.advance(id)
        else:
            grammar = Grammar(vocabulary, layout, release=mode == "release")
        if mode != "release":
            assert grammar.allowed == (range(SOI, SOI + 1),)
        ids, walk = [SOI], Released(layout.grids)
        grammar.advance(SOI)
        walk.take(SOI)
        while walk.is_generating:
            allowed = walk.allowed
            assert grammar.allowed == (allowed,)
            assert grammar.in_picture
            assert grammar.forced == (allowed.start if len(allowed) == 1 else None)
            ids.append(draw.choice(allowed))
            walk.take(ids[-1])
            # What follows does not depend on the code, which need not be known.
            grammar.advance(None if len(allowed) > 1 and draw.random() < 0.5 else ids[-1])
        assert not grammar.in_picture
        assert grammar.is_finished == (mode == "only picture")
        layout.codes(ids)


@pytest.mark.parametrize("pixel_first", [False, True])
def test_an_only_picture_ends_the_answer(pixel_first: bool) -> None:
    vocabulary = replace(SMALL, pixel_first=pixel_first)
    layout = image_layout((32, 48), vocabulary)
    grammar = Grammar(vocabulary, layout)
    for id, allowed in zip(layout.template, layout.allowed, strict=True):
        assert not grammar.is_finished
        assert grammar.allowed == (allowed,)
        grammar.advance(id)
    assert grammar.is_finished
    assert grammar.allowed == ()
    assert grammar.forced is None
    with pytest.raises(ValueError, match="id 3 can't stand here: allowed are none"):
        grammar.advance(3)


def ids(grammar: Grammar) -> list[int]:
    """Everything that may come."""
    return [id for allowed in grammar.allowed for id in allowed]


def feed(grammar: Grammar, script: Sequence[int]) -> None:
    for id in script:
        grammar.advance(id)


@pytest.mark.parametrize(
    "sizes", [[(32, 48)], [(48, 32), (32, 48), (32, 16)], [(64, 64), (16, 16), (64, 16)]]
)
def test_a_conversation_goes_from_words_over_a_size_to_a_picture_and_back(sizes: list[Size]) -> None:
    draw = random.Random(1)
    grammar = Grammar(SMALL, sizes=sizes)
    tokens = {size: SMALL.size_tokens(size) for size in sizes}
    words = [*range(20), *sorted({height for height, _ in tokens.values()})]
    seen = set()
    for _ in range(30):
        assert ids(grammar) == words
        assert not grammar.in_picture
        feed(grammar, [draw.randrange(20) for _ in range(draw.randrange(3))])
        height = draw.choice(words[20:])
        grammar.advance(height)
        assert not grammar.in_picture
        assert ids(grammar) == sorted(width for tall, width in tokens.values() if tall == height)
        width = draw.choice(ids(grammar))
        grammar.advance(width)
        (size,) = (size for size, pair in tokens.items() if pair == (height, width))
        seen.add(size)
        layout = image_layout(size, SMALL)
        assert grammar.layout == layout
        for id, allowed in zip(layout.template, layout.allowed, strict=True):
            assert grammar.allowed == (allowed,)
            grammar.advance(id)
        assert not grammar.is_finished
    assert seen == set(sizes)


def test_ranges_rise_and_do_not_overlap() -> None:
    grammar = Grammar(SMALL, sizes=[(64, 64), (16, 16), (64, 16)])
    assert ids(grammar) == sorted(set(ids(grammar)))
    grammar.advance(SMALL.size_tokens((64, 64))[0])
    assert ids(grammar) == [SMALL.width_ids[0], SMALL.width_ids[3]]


def test_words_only() -> None:
    grammar = Grammar(SMALL, sizes=[(32, 48)])
    grammar.words_only = True
    assert grammar.allowed == (range(20),)
    with pytest.raises(ValueError, match="allowed are 0 to 19$"):
        grammar.advance(SMALL.height_ids[1])
    grammar.words_only = False
    grammar.advance(SMALL.height_ids[1])
    # A picture that has begun goes on.
    grammar.words_only = True
    assert grammar.forced == SMALL.width_ids[2]


def test_without_sizes_there_are_words_alone() -> None:
    grammar = Grammar(SMALL)
    assert grammar.allowed == (range(20),)
    feed(grammar, [0, 19, 7])
    assert grammar.allowed == (range(20),)


def test_the_release_lets_sizes_and_markers_stand_in_the_text() -> None:
    layout = ImageLayout(Grids((1, 1), (1, 2)), SMALL)
    grammar = Grammar(SMALL, layout, release=True)
    vocabulary = SMALL
    everything = set(range(vocabulary.size))
    never = {
        *vocabulary.semantic_ids,
        *vocabulary.pixel_ids,
        *range(vocabulary.end_of_line, vocabulary.height_ids[0]),
    }
    assert set(ids(grammar)) == everything - never
    script = [vocabulary.end_of_image, vocabulary.width_ids[3], vocabulary.height_ids[0], vocabulary.size - 1]
    feed(grammar, script)
    for _ in range(2):
        assert set(ids(grammar)) == everything - never
        feed(grammar, layout.template)
        assert not grammar.is_finished
    with pytest.raises(ValueError, match="id 22 can't stand here: allowed are 0 to 21, 27 to 34, 59 to 61"):
        grammar.advance(vocabulary.end_of_line)


def test_refused_ids_name_what_is_allowed() -> None:
    grammar = Grammar(SMALL, image_layout((32, 48), SMALL))
    with pytest.raises(ValueError, match="id 21 can't stand here: allowed are 20$"):
        grammar.advance(21)
    feed(grammar, [20, 23])
    with pytest.raises(ValueError, match="id 5 can't stand here: allowed are 35 to 42$"):
        grammar.advance(5)
    # What was refused changed nothing.
    grammar.advance(42)
    chat = Grammar(SMALL, sizes=[(64, 64), (64, 16)])
    with pytest.raises(ValueError, match="id 27 can't stand here: allowed are 0 to 19, 30$"):
        chat.advance(27)
    chat.advance(30)
    with pytest.raises(ValueError, match="id 3 can't stand here: allowed are 31, 34$"):
        chat.advance(3)


def test_sizes_without_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="80 has no token"):
        Grammar(SMALL, sizes=[(32, 48), (80, 16)])
