"""Ids of any vocabulary, pictures of any size and conversations of any shape: drawn at random, held to what must be."""

import unicodedata
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from illume_lightning.data.chat import render
from illume_lightning.data.conversation import IMAGE, Conversation, Turn
from illume_lightning.data.packing import SizedImage
from illume_lightning.data.text_tokenizer import TextTokenizer, train_tokenizer
from illume_lightning.data.token_sequence import MARKER, TEXT, token_sequence
from illume_lightning.grammar import Grammar
from illume_lightning.image_layout import image_layout
from illume_lightning.resolution import Size
from illume_lightning.vocabulary import MARKERS, Vocabulary

few = settings(max_examples=60, deadline=None, derandomize=True)
counts = st.integers(1, 40)
sides = st.integers(1, 6).map(lambda number: 16 * number)
sizes = st.tuples(sides, sides)


@st.composite
def vocabularies(draw: st.DrawFn, **fixed: Any) -> Vocabulary:
    given = {
        "num_text": draw(counts),
        "semantic_codes": draw(counts),
        "pixel_codes": draw(counts),
        "size_step": 16,
        "num_sizes": draw(st.integers(6, 9)),
        "num_unused": draw(st.integers(0, 5)),
        "pixel_first": draw(st.booleans()),
    }
    return Vocabulary(**(given | fixed))


@few
@given(vocabularies(size_step=8))
def test_every_id_is_one_thing(vocabulary: Vocabulary) -> None:
    markers = range(vocabulary.start_of_image, vocabulary.start_of_image + len(MARKERS))
    parts = [
        *(range(vocabulary.num_text), markers, vocabulary.height_ids, vocabulary.width_ids),
        *(vocabulary.semantic_ids, vocabulary.pixel_ids, range(vocabulary.pixel_ids.stop, vocabulary.size)),
    ]
    assert [id for part in parts for id in part] == list(range(vocabulary.size)), (
        "in order, no gap, no overlap"
    )
    strings = list(vocabulary.tokens())
    assert len(set(strings)) == len(strings) == vocabulary.num_vision - vocabulary.num_unused
    reached = set()
    for height in range(8, 8 * vocabulary.num_sizes + 1, 8):
        for width in range(8, 8 * vocabulary.num_sizes + 1, 8):
            pair = vocabulary.size_tokens((height, width))
            assert vocabulary.size_of(*pair) == (height, width)
            assert strings[pair[0] - vocabulary.num_text] == f"<height_{height}>"
            assert strings[pair[1] - vocabulary.num_text] == f"<width_{width}>"
            reached.add(pair)
    assert len(reached) == vocabulary.num_sizes**2


@few
@given(vocabularies(), sizes, st.data())
def test_codes_are_found_again_and_nothing_else_is_taken(
    vocabulary: Vocabulary, size: Size, data: st.DataObject
) -> None:
    layout = image_layout(size, vocabulary)
    codes = [
        data.draw(st.lists(st.integers(0, count - 1), min_size=len(slots), max_size=len(slots)))
        for count, slots in (
            (vocabulary.semantic_codes, layout.semantic_slots),
            (vocabulary.pixel_codes, layout.pixel_slots),
        )
    ]
    ids = layout.ids(*codes)
    assert layout.codes(ids) == tuple(codes)
    assert sorted((*layout.semantic_slots, *layout.pixel_slots)) == [
        place
        for place, allowed in enumerate(layout.allowed)
        if allowed in (vocabulary.semantic_ids, vocabulary.pixel_ids)
    ]
    place = data.draw(st.integers(0, len(ids) - 1))
    wrong = data.draw(st.integers(-3, vocabulary.size + 3).filter(lambda id: id not in layout.allowed[place]))
    with pytest.raises(ValueError, match=f"id {wrong} at position {place}"):
        layout.codes([*ids[:place], wrong, *ids[place + 1 :]])
    with pytest.raises(ValueError, match="ids for a picture"):
        layout.codes(data.draw(st.sampled_from([ids[:-1], [*ids, 0], []])))


@few
@given(
    vocabularies(),
    st.lists(sizes, min_size=1, max_size=4, unique=True),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_every_allowed_path_is_words_and_whole_pictures(
    vocabulary: Vocabulary, known: list[Size], is_only_picture: bool, draw: Any
) -> None:
    wanted = known[0]
    grammar = (
        Grammar(vocabulary, image_layout(wanted, vocabulary))
        if is_only_picture
        else Grammar(vocabulary, sizes=known)
    )
    answer: list[int] = []
    while not grammar.is_finished and (
        len(answer) < 200 or grammar.in_picture or grammar._height is not None
    ):
        allowed = [id for ids in grammar.allowed for id in ids]
        assert allowed == sorted(set(allowed)) and allowed
        for id in (draw.randrange(-2, vocabulary.size + 2) for _ in range(3)):
            if id not in allowed:
                with pytest.raises(ValueError, match=f"id {id} can't stand here"):
                    grammar.advance(id)
        assert [id for ids in grammar.allowed for id in ids] == allowed, "what is refused changes nothing"
        answer.append(draw.choice(allowed))
        grammar.advance(answer[-1])
    found = (
        parse(answer, vocabulary) if not is_only_picture else [image_layout(wanted, vocabulary).codes(answer)]
    )
    assert not is_only_picture or len(found) == 1
    for part in found:
        assert isinstance(part, tuple) or 0 <= part < vocabulary.num_text


def parse(ids: list[int], vocabulary: Vocabulary) -> list[Any]:
    """Ids of words, and (height, width, semantic codes, pixel codes) of pictures that follow their sizes."""
    found: list[Any] = []
    place = 0
    while place < len(ids):
        if ids[place] < vocabulary.num_text:
            found.append(ids[place])
            place += 1
            continue
        size = vocabulary.size_of(ids[place], ids[place + 1])
        layout = image_layout(size, vocabulary)
        start, place = place + 2, place + 2 + layout.length
        if ids[start : start + 1] == [vocabulary.start_of_image]:
            found.append((size, *layout.codes(ids[start:place])))
        else:
            found.append((size, None, None))  # named alone
            place = start
    return found


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return train_tokenizer(["a red star", "a blue star"], tmp_path_factory.mktemp("text"), 270)


words = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "Z")), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(words, words, st.booleans(), st.booleans(), sizes), min_size=1, max_size=4),
    st.booleans(),
    st.data(),
)
def test_a_conversation_is_found_again_in_its_tokens(
    tokenizer: TextTokenizer, exchanges: list[Any], pixel_first: bool, data: st.DataObject
) -> None:
    assume(any(made for *_, made, _ in exchanges))  # then every picture follows its size
    vocabulary = Vocabulary(tokenizer.num_text, 7, 9, 16, 8, 0, pixel_first)
    turns, pictures = [], []
    for asked, answered, is_shown, is_made, size in exchanges:
        turns += [Turn("user", IMAGE * is_shown + asked), Turn("assistant", answered + IMAGE * is_made)]
        pictures += [size] * (is_shown + is_made)
    draw = np.random.default_rng(data.draw(st.integers(0, 99)))
    layouts = [image_layout(size, vocabulary) for size in pictures]
    codes = [
        (draw.integers(0, 7, len(layout.semantic_slots)), draw.integers(0, 9, len(layout.pixel_slots)))
        for layout in layouts
    ]
    shown = [SizedImage(size, False) for size in pictures]
    pieces = render(Conversation(tuple(turns)), tokenizer)
    sequence = token_sequence(
        pieces, shown, vocabulary, lambda number: codes[number], range(len(pictures)), True
    )
    found = parse(sequence.ids.tolist(), vocabulary)
    assert [part for part in found if isinstance(part, tuple)] == [
        (size, semantic.tolist(), pixel.tolist())
        for size, (semantic, pixel) in zip(pictures, codes, strict=True)
    ]
    assert not sequence.inputs and not sequence.targets
    text = tokenizer.decode([part for part in found if not isinstance(part, tuple)])
    told = [f"<|im_start|>{turn.role}\n{turn.text.replace(IMAGE, '')}<|im_end|>\n" for turn in turns]
    assert text.endswith(unicodedata.normalize("NFC", "".join(told)))
    assert sequence.segments[sequence.ids < vocabulary.num_text].max(initial=TEXT) == TEXT
    assert (sequence.segments[sequence.ids >= vocabulary.num_text] > TEXT).all()
    learned = parse_learned(sequence, vocabulary)
    assert learned == sum(is_made for *_, is_made, _ in exchanges), "pictures of answers alone are learned"


def parse_learned(sequence: Any, vocabulary: Vocabulary) -> int:
    """Number of pictures that are learned, each whole and with its size."""
    starts = np.flatnonzero(sequence.ids == vocabulary.start_of_image)
    ends = np.flatnonzero(sequence.ids == vocabulary.end_of_image)
    count = 0
    for start, end in zip(starts, ends, strict=True):
        share = sequence.is_supervised[start - 2 : end + 1]
        assert share.all() or not share.any()
        assert (sequence.segments[start - 2 : start + 1] == MARKER).all()
        count += bool(share.all())
    return count
