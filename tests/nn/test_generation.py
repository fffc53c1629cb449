"""The engine: a batch is its singles, the cache is no cache, and every picture is whole."""

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from tiny_mllm import VOCABULARY, build_mllm
from torch import Tensor

from illume_lightning.grammar import Grammar
from illume_lightning.image_layout import image_layout
from illume_lightning.nn.generation import Engine, Prompt, Request, Update
from illume_lightning.nn.key_value_cache import KeyValueCache
from illume_lightning.nn.mllm import MLLM
from illume_lightning.nn.token_sampling import SegmentSampling, TokenSampling, draw, guide
from illume_lightning.resolution import Size
from illume_lightning.vocabulary import Vocabulary

END_IDS = (1, 2)
CHAT_SIZES = ((32, 48), (48, 32), (32, 16))
GREEDY = SegmentSampling(0.0)
ANY = SegmentSampling(1e6)
"""Draws from all that may come, whatever the model says."""


@pytest.fixture(
    params=[(), (4,), (4, True), (4, False, True)],
    ids=["", "slot embedding", "pixel first", "discrete input"],
)
def mllm(request: pytest.FixtureRequest) -> MLLM:
    return build(*request.param)


def build(slot_grid: int = 0, pixel_first: bool = False, discrete_input: bool = False) -> MLLM:
    """A tiny model that often names sizes, and whose slots differ."""
    torch.manual_seed(0)
    vocabulary = replace(VOCABULARY, pixel_first=pixel_first)
    mllm = build_mllm(slot_grid=slot_grid, vocabulary=vocabulary, discrete_input=discrete_input)
    with torch.no_grad():
        heights = VOCABULARY.height_ids
        mllm.head.vision[heights.start - 50 : heights.stop - 50] *= 1.5
        mllm.head.text *= 0.5
        mllm.head.text[list(END_IDS)] = 0
        if mllm.slot_embedding is not None:
            mllm.slot_embedding.weight.normal_(std=0.5)
    return mllm


def prompt(
    seed: int,
    length: int = 6,
    picture: Size | None = None,
    size: Size | None = None,
    vocabulary: Vocabulary = VOCABULARY,
) -> Prompt:
    """Words; a picture among them, and the size of one to make behind them, where asked for."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, 50, (length,), generator=generator).tolist()
    tail = [*words[2:], *(VOCABULARY.size_tokens(size) if size else ())]
    if picture is None:
        return Prompt([*words[:2], *tail], [0] * len([*words[:2], *tail]))
    layout = image_layout(picture, vocabulary)
    image = torch.rand(1, 3, *picture, generator=generator) * 2 - 1
    return Prompt(
        ids=[*words[:2], *layout.template, *tail],
        slot_ids=[0, 0, *layout.slot_ids, *(0 for _ in tail)],
        images=[image],
        semantic_slots=[2 + slot for slot in layout.semantic_slots],
        pixel_slots=[2 + slot for slot in layout.pixel_slots],
    )


def to_make(
    seed: int,
    size: Size,
    guidance: float,
    picture: Size | None = None,
    vocabulary: Vocabulary = VOCABULARY,
    **sampling: SegmentSampling,
) -> Request:
    """A request for one picture."""
    return Request(
        prompt(seed, 7, picture, size, vocabulary),
        layout=image_layout(size, vocabulary),
        unconditional=prompt(seed + 1, 3, picture, size, vocabulary),
        sampling=TokenSampling(guidance=guidance, **sampling),
        seed=seed,
    )


def as_codes(prompt: Prompt | None, seed: int) -> Prompt | None:
    """The same with codes, drawn from the seed, instead of pictures."""
    if prompt is None:
        return None
    ids, draw = list(prompt.ids), random.Random(seed)
    for slots, kind in (
        (prompt.semantic_slots, VOCABULARY.semantic_ids),
        (prompt.pixel_slots, VOCABULARY.pixel_ids),
    ):
        for slot in slots:
            ids[slot] = draw.choice(kind)
    return Prompt(ids, prompt.slot_ids)


def mixed_for(mllm: MLLM) -> list[Request]:
    """Eight requests of all kinds, as a model reads them."""
    requests = mixed(mllm.vocabulary)
    if not mllm.discrete_input:
        return requests
    return [
        replace(request, prompt=as_codes(request.prompt, n), unconditional=as_codes(request.unconditional, n))
        for n, request in enumerate(requests)
    ]


def mixed(vocabulary: Vocabulary = VOCABULARY) -> list[Request]:
    """Eight requests of all kinds."""
    warm, narrow = SegmentSampling(1.2, top_k=20), SegmentSampling(0.9, 0, 0.9)
    chat = TokenSampling(SegmentSampling(), warm, narrow, guidance=2.0)
    wordy = Request(prompt(70, 9), 90, sizes=CHAT_SIZES, unconditional=prompt(71, 5), sampling=chat, seed=5)
    return [
        Request(prompt(10, 1), 30, sampling=TokenSampling(GREEDY)),
        Request(
            prompt(20, 12, (48, 32), None, vocabulary),
            40,
            sampling=TokenSampling(SegmentSampling(0.8, 30, 0.95)),
            seed=4,
        ),
        to_make(30, (32, 48), 2.0, None, vocabulary),
        replace(to_make(40, (64, 64), 3.0, None, vocabulary, semantic=warm), unconditional=None),
        to_make(50, (48, 32), 1.5, (48, 32), vocabulary, semantic=GREEDY, pixel=GREEDY),
        to_make(60, (32, 64), 0.5, (64, 32), vocabulary, semantic=narrow, pixel=warm),
        wordy,
        replace(
            wordy,
            prompt=prompt(80, 8, (64, 64), None, vocabulary),
            sampling=replace(chat, guidance=1.0),
            seed=5,
        ),
    ]


def collect(updates: Iterable[Update], count: int) -> list[list[int]]:
    """Answers; each has one last update."""
    answers: list[list[int]] = [[] for _ in range(count)]
    finished = []
    for update in updates:
        assert update.number not in finished
        answers[update.number].extend(update.ids)
        finished += [update.number] * update.is_finished
    assert sorted(finished) == list(range(count))
    return answers


def answer(mllm: MLLM, requests: Sequence[Request], slots: int = 16, context: int = 256) -> list[list[int]]:
    engine = Engine(mllm, END_IDS, slots, context)
    return collect(engine.run(requests), len(requests))


def passes(mllm: MLLM) -> list[tuple[int, int]]:
    """Shape (rows, tokens) of every pass of the trunk from now on."""
    shapes: list[tuple[int, int]] = []

    def note(_module: object, _arguments: object, named: dict[str, Tensor]) -> None:
        shapes.append((named["inputs_embeds"].shape[0], named["inputs_embeds"].shape[1]))

    mllm.trunk.register_forward_pre_hook(note, with_kwargs=True)
    return shapes


def pictures(ids: Sequence[int], sizes: Iterable[Size], vocabulary: Vocabulary = VOCABULARY) -> list[Size]:
    """Sizes of the pictures in an answer; all of them are whole, and between them are words."""
    tokens = {VOCABULARY.size_tokens(size): size for size in sizes}
    found, place = [], 0
    while place < len(ids):
        if ids[place] < VOCABULARY.num_text:
            place += 1
            continue
        size = tokens[ids[place], ids[place + 1]]
        layout = image_layout(size, vocabulary)
        layout.codes(ids[place + 2 : place + 2 + layout.length])
        found.append(size)
        place += 2 + layout.length
    return found


@torch.no_grad()
def plainly(mllm: MLLM, request: Request) -> list[int]:
    """The answer without a cache, with the head of all ids, masked: what the engine should say."""
    grammar = Grammar(mllm.vocabulary, request.layout, request.sizes)
    uniforms = torch.rand(request.budget, generator=torch.Generator().manual_seed(request.seed))
    room_for_picture = 2 + max((image_layout(size, VOCABULARY).length for size in request.sizes), default=0)
    ids: list[int] = []
    slot_ids: list[int] = []
    while len(ids) < request.budget:
        grammar.words_only = request.budget - len(ids) < room_for_picture
        scores = logits(mllm, request.prompt, ids, slot_ids)
        settings, kind = (
            request.sampling,
            grammar.layout.allowed[grammar.position] if grammar.in_picture else None,
        )
        if kind and request.unconditional is not None:
            scores = guide(scores, logits(mllm, request.unconditional, ids, slot_ids), settings.guidance)
        masked = torch.full_like(scores, -torch.inf)
        for allowed in grammar.allowed:
            masked[:, allowed.start : allowed.stop] = scores[:, allowed.start : allowed.stop]
        sampling = {None: settings.text, VOCABULARY.semantic_ids: settings.semantic}.get(kind, settings.pixel)
        id = int(draw(masked, sampling, uniforms[len(ids) : len(ids) + 1]))
        if id in END_IDS and not kind:
            break
        slot_ids.append(grammar.layout.slot_ids[grammar.position] if grammar.in_picture else 0)
        ids.append(id)
        grammar.advance(id)
    return ids


def logits(mllm: MLLM, prompt: Prompt, ids: list[int], slot_ids: list[int]) -> Tensor:
    """(1, K) of the next token, by a pass over all that stands before it."""
    slots = [torch.tensor(slots, dtype=torch.long) for slots in (prompt.semantic_slots, prompt.pixel_slots)]
    inputs = torch.tensor([[*prompt.ids, *ids]]), prompt.images, *slots
    embeds = mllm.embed(*inputs, torch.tensor([[*prompt.slot_ids, *slot_ids]]))
    hidden = mllm.hidden(embeds, torch.arange(embeds.shape[1])[None])
    return mllm.head.logits(hidden[:, -1])


def test_a_batch_is_its_singles_and_equals_plain_passes(mllm: MLLM) -> None:
    requests = mixed_for(mllm)
    together = answer(mllm, requests)
    for number, request in enumerate(requests):
        assert answer(mllm, [request], slots=2) == [together[number]], number
        assert plainly(mllm, request) == together[number], number
    for number in (2, 3, 4, 5):
        requests[number].layout.codes(together[number])
    # Both conversations hold pictures of several sizes, so the second sequence opens and closes on the way.
    for number in (6, 7):
        assert len(set(pictures(together[number], CHAT_SIZES, mllm.vocabulary))) > 1, number
    # Neither of the two answers in words alone is cut off at once.
    assert all(len(together[number]) > 3 for number in (0, 1))
    assert len({tuple(ids) for ids in together}) == 8


def test_everything_has_an_influence() -> None:
    mllm = build(4)
    request = to_make(60, (32, 64), 1.5, (64, 32))
    (ids,) = answer(mllm, [request])
    image = -request.prompt.images[0]
    others = [
        replace(request, seed=1),
        replace(request, prompt=prompt(99, 7, (64, 32), (32, 64))),
        replace(request, prompt=replace(request.prompt, images=[image])),
        replace(request, unconditional=replace(request.unconditional, images=[image])),
        replace(request, unconditional=None),
        replace(request, sampling=replace(request.sampling, guidance=3.0)),
        replace(request, prompt=replace(request.prompt, slot_ids=[0] * len(request.prompt.ids))),
    ]
    answers = answer(mllm, others)
    assert all(other != ids for other in answers)
    assert answer(mllm, [request]) == [ids]


def test_codes_in_the_place_of_pictures_have_an_influence() -> None:
    mllm = build(4, discrete_input=True)
    request = to_make(60, (32, 64), 1.5, (64, 32))
    codes = [as_codes(request.prompt, seed) for seed in (0, 1)]
    assert codes[0].ids[:4] == codes[1].ids[:4] and codes[0].ids[-5:] == codes[1].ids[-5:]
    asked = [
        replace(request, prompt=prompt, unconditional=codes[0]) for prompt in (codes[0], codes[1], codes[0])
    ]
    answers = answer(mllm, asked)
    assert answers[0] == answers[2] != answers[1]
    with pytest.raises(ValueError, match="has discrete input: put the pictures' codes into ids"):
        answer(mllm, [request])


def test_twelve_requests_through_few_slots_are_the_same() -> None:
    mllm = build()
    requests = [*mixed(), *(replace(request, seed=20 + n) for n, request in enumerate(mixed()[3:7]))]
    alone = [answer(mllm, [request], slots=2)[0] for request in requests]
    for slots in (2, 3, 4):
        assert answer(mllm, requests, slots) == alone, slots


def test_a_free_place_is_filled_at_the_next_step() -> None:
    mllm = build()
    lengths = [5, 2, 7, 1, 3, 4, 2, 6, 1, 1, 3, 2]
    requests = [
        Request(prompt(number, 5), length, sampling=TokenSampling(ANY), seed=number)
        for number, length in enumerate(lengths)
    ]
    shapes = passes(mllm)
    taken: list[int] = []
    engine = Engine(mllm, (), slots=3, context=64)
    answers = collect(engine.run(watched(requests, taken)), 12)
    assert [len(ids) for ids in answers] == lengths
    queue, active, expected = list(lengths), [], []
    while queue or active:
        while queue and len(active) < 3:
            active.append(queue.pop(0))
        expected.append(len(active))
        active = [left - 1 for left in active if left > 1]
    # A step feeds one token of every sequence; what fills places sees four.
    assert [rows for rows, tokens in shapes if tokens == 1] == expected
    assert sum(rows for rows, tokens in shapes if tokens == 4) == 12
    assert taken == list(range(12))


def watched(requests: Sequence[Request], taken: list[int]) -> Iterator[Request]:
    """Requests, with a note of those that were read."""
    for number, request in enumerate(requests):
        taken.append(number)
        yield request


def test_requests_are_read_as_places_become_free() -> None:
    mllm = build()
    requests = [Request(prompt(number), 10, sampling=TokenSampling(ANY)) for number in range(10)]
    taken: list[int] = []
    run = Engine(mllm, (), slots=2, context=64).run(watched(requests, taken))
    assert not taken
    next(run)
    # Two are answered, one is looked at ahead.
    assert taken == [0, 1, 2]
    run.close()


def test_guided_pictures_take_two_slots_and_structure_rides_along() -> None:
    mllm = build()
    shapes = passes(mllm)
    layout = image_layout((32, 48), VOCABULARY)
    codes = len(layout.semantic_slots) + len(layout.pixel_slots)
    answer(mllm, [to_make(30, (32, 48), 2.0)])
    # The prompts but for their last token; then it, the start of image and of the semantic grid; then codes, with the
    # markers that follow: end of line, of the semantic grid, start of the pixel grid.
    assert shapes[0] == (2, 8)
    assert shapes[1] == (2, 3)
    assert len(shapes) == 1 + codes
    assert {rows for rows, _ in shapes} == {2}
    assert {tokens for _, tokens in shapes[2:]} == {1, 2, 4}


def test_guidance_1_runs_no_second_sequence() -> None:
    mllm = build()
    request = to_make(30, (32, 48), 1.0)
    unguided = answer(mllm, [replace(request, unconditional=None)])
    shapes = passes(mllm)
    assert answer(mllm, [request]) == unguided
    assert {rows for rows, _ in shapes} == {1}
    wordy = mixed()[6]
    shapes.clear()
    (ids,) = answer(mllm, [replace(wordy, sampling=replace(wordy.sampling, guidance=1.0))])
    assert pictures(ids, CHAT_SIZES)
    assert {rows for rows, _ in shapes} == {1}


def test_in_conversations_the_second_sequence_runs_for_pictures_alone() -> None:
    mllm = build()
    shapes = passes(mllm)
    (ids,) = answer(mllm, [mixed()[6]], slots=2)
    layouts = [image_layout(size, VOCABULARY) for size in pictures(ids, CHAT_SIZES)]
    assert len(layouts) > 1
    codes = sum(len(layout.semantic_slots) + len(layout.pixel_slots) for layout in layouts)
    steps = [rows for rows, tokens in shapes if tokens <= 4]
    assert steps.count(2) == codes
    # Openings of the second sequence see what it has missed.
    assert len(shapes) - len(steps) == 1 + len(layouts)


def test_updates_tell_words_lines_and_the_end() -> None:
    mllm = build()
    request = to_make(40, (64, 64), 1.0)
    updates = list(Engine(mllm, END_IDS, 2, 128).run([request]))
    rows = sum(height for height, _ in request.layout.grids)
    # The end of the last line is the end of the picture.
    assert len(updates) == rows
    shares = [update.picture for update in updates[:-1]]
    assert all(0 < a < b < 1 for a, b in itertools.pairwise(shares))
    assert not any(update.ids or update.is_finished for update in updates[:-1])
    assert updates[-1].is_finished and updates[-1].picture == 0
    request.layout.codes(updates[-1].ids)
    words = list(Engine(mllm, (), 2, 128).run([Request(prompt(1), 5, sampling=TokenSampling(ANY))]))
    assert [len(update.ids) for update in words] == [1] * 5
    assert [update.is_finished for update in words] == [False] * 4 + [True]


def test_an_end_id_ends_and_is_no_part_of_the_answer() -> None:
    mllm = build()
    request = Request(prompt(5), 60, sampling=TokenSampling(ANY), seed=2)
    (whole,) = collect(Engine(mllm, (), 2, 128).run([request]), 1)
    assert len(whole) == 60
    end = whole[17]
    (cut,) = collect(Engine(mllm, [end], 2, 128).run([request]), 1)
    assert cut == whole[: whole.index(end)]
    (nothing,) = collect(Engine(mllm, [whole[0]], 2, 128).run([request]), 1)
    assert nothing == []


def test_a_picture_begins_only_where_all_of_it_fits() -> None:
    mllm = build()
    sizes = ((32, 16), (32, 48))
    room = 2 + image_layout((32, 48), VOCABULARY).length
    requests = [
        Request(prompt(length), length, sizes=sizes, sampling=TokenSampling(ANY, ANY, ANY), seed=seed)
        for length in (1, 2, room - 1, room, room + 1, 3 * room, 7 * room)
        for seed in range(25)
    ]
    answers = collect(Engine(mllm, (), 16, 256).run(requests), len(requests))
    begins: set[int] = set()
    for request, ids in zip(requests, answers, strict=True):
        assert len(ids) == request.max_tokens
        pictures(ids, sizes)
        begins |= {request.max_tokens - place for place, id in enumerate(ids) if id in VOCABULARY.height_ids}
    assert min(begins) == room


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_every_picture_is_whole(guidance: float) -> None:
    mllm = build()
    sizes = ((16, 16), (64, 32), (32, 64), (64, 64))
    sampling = TokenSampling(ANY, SegmentSampling(3.0, 5), ANY, guidance)
    requests = [
        Request(prompt(seed), 150, None, sizes, prompt(seed + 50, 3), sampling, seed) for seed in range(12)
    ]
    answers = collect(Engine(mllm, (), 7, 256).run(requests), 12)
    found = [size for ids in answers for size in pictures(ids, sizes)]
    assert set(found) == set(sizes)


def test_a_cancelled_request_ends_and_the_others_do_not_notice() -> None:
    mllm = build()
    requests = mixed()
    whole = answer(mllm, requests)
    for cancelled in (1, 4, 6):
        engine = Engine(mllm, END_IDS, 12, 256)
        answers: list[list[int]] = [[] for _ in requests]
        last: dict[int, int] = {}
        for place, update in enumerate(engine.run(requests)):
            answers[update.number].extend(update.ids)
            if update.number == cancelled and update.number not in last:
                engine.cancel(cancelled)
                last[cancelled] = place
            assert not (update.number in last and update.is_finished and update.number != cancelled)
            if update.is_finished:
                last[update.number] = place
        assert sorted(last) == list(range(8))
        ids = answers.pop(cancelled)
        assert 0 < len(ids) < len(whole[cancelled])
        assert ids == whole[cancelled][: len(ids)]
        assert answers == [*whole[:cancelled], *whole[cancelled + 1 :]]


def test_a_cancelled_request_gives_its_place_away() -> None:
    mllm = build()
    engine = Engine(mllm, (), slots=2, context=128)
    requests = [Request(prompt(n), 100, sampling=TokenSampling(ANY), seed=n) for n in range(3)]
    counts = [0, 0, 0]
    for step, update in enumerate(engine.run(requests)):
        counts[update.number] += len(update.ids)
        if step == 5:
            engine.cancel(0)
    assert counts[0] < 6
    assert counts[1:] == [100, 100]


def test_stopping_early_leaves_nothing_behind() -> None:
    mllm = build()
    mllm.trunk.config._attn_implementation = "eager"
    engine = Engine(mllm, END_IDS, 12, 256)
    whole = collect(engine.run(mixed()), 8)
    run = engine.run(mixed())
    for _ in (next(run), run.close()):  # between updates and after the end the model is its owner's
        assert mllm.trunk.config._attn_implementation == "eager"
        assert not any("forward" in vars(layer) for layer in mllm.modules())
    assert collect(engine.run(mixed()), 8) == whole


def test_memory_is_taken_once_and_counted() -> None:
    mllm = build()
    engine = Engine(mllm, END_IDS, slots=5, context=200)
    assert engine.cache.num_bytes(torch.float32) == 2 * (2 * 5 * 2 * 201 * 8) * 4
    assert engine.cache.num_bytes(torch.bfloat16) == 2 * (2 * 5 * 2 * 201 * 8) * 2
    places = set()
    for _ in range(2):
        for _ in engine.run(mixed()):
            stores = engine.cache._keys, engine.cache._values
            places.add(tuple(store.data_ptr() for store in stores))
            assert sum(store.nbytes for store in stores) == engine.cache.num_bytes(torch.float32)
    assert len(places) == 1


def test_what_attention_reads_grows_in_steps() -> None:
    cache = KeyValueCache(build().trunk.config, slots=3, context=100)
    mask = cache.at(torch.tensor([[4, 5], [9, cache.padding]]), longest=10)
    assert mask.shape == (2, 1, 2, 64)
    assert mask.sum(-1).flatten().tolist() == [5, 6, 10, 64]
    assert cache.at(torch.tensor([[64]]), longest=65).shape == (1, 1, 1, 100)


def test_an_answer_may_fill_the_context() -> None:
    mllm = build()
    request = Request(prompt(3, 20), 44, sampling=TokenSampling(ANY))
    answers = [answer(mllm, [request], context=context)[0] for context in (64, 200)]
    assert answers[0] == answers[1]
    guided = to_make(30, (32, 48), 2.0)
    longest = len(guided.prompt.ids) + guided.layout.length
    assert answer(mllm, [guided], 2, longest) == answer(mllm, [guided])


def test_what_the_constructor_refuses() -> None:
    torch.manual_seed(0)
    mllm = build_mllm(max_positions=64)
    with pytest.raises(ValueError, match="1 slots: a guided answer takes 2"):
        Engine(mllm, END_IDS, slots=1, context=64)
    for context in (1, 65):
        with pytest.raises(
            ValueError, match=f"a context of {context} tokens: the language model takes 2 to 64"
        ):
            Engine(mllm, END_IDS, context=context)


def test_what_cannot_be_answered_is_refused() -> None:
    engine = Engine(build(), END_IDS, 4, 64)
    words = Request(prompt(1), 20)
    engine.check(words)
    with pytest.raises(ValueError, match="the prompt is empty"):
        engine.check(replace(words, prompt=Prompt([], [])))
    with pytest.raises(ValueError, match="the prompt is empty"):
        engine.check(replace(words, unconditional=Prompt([], [])))
    with pytest.raises(
        ValueError, match="a prompt of 6 tokens and an answer of up to 59 don't fit .* 64: shorten"
    ):
        engine.check(replace(words, max_tokens=59))
    engine.check(replace(words, max_tokens=58))
    with pytest.raises(ValueError, match="a prompt of 7 tokens and an answer of up to 58"):
        engine.check(replace(words, max_tokens=58, unconditional=prompt(2, 7)))
    with pytest.raises(ValueError, match="an answer of up to 0 .* change max_tokens"):
        engine.check(replace(words, max_tokens=0))
    with pytest.raises(ValueError, match="144 has no token"):
        engine.check(replace(words, sizes=[(144, 32)]))
    made = to_make(30, (32, 48), 2.0)
    engine.check(made)
    with pytest.raises(ValueError, match="the prompt ends with id 67, .* with 65: end both with the size"):
        engine.check(replace(made, unconditional=prompt(1, 3, None, (48, 16))))
    with pytest.raises(ValueError, match="up to 78"):
        engine.check(to_make(30, (128, 96), 2.0))


def test_a_refused_request_stops_the_run_and_the_engine_goes_on() -> None:
    mllm = build()
    engine = Engine(mllm, (), slots=2, context=64)
    good = Request(prompt(1), 5, sampling=TokenSampling(ANY))
    shapes = passes(mllm)
    with pytest.raises(ValueError, match="don't fit"):
        list(engine.run([replace(good, max_tokens=100)]))
    assert not shapes
    assert [len(ids) for ids in collect(engine.run([good, good, good]), 3)] == [5, 5, 5]


def test_prompts_without_pictures_leave_the_towers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    mllm = build()
    seen = []
    features = mllm.features
    monkeypatch.setattr(mllm, "features", lambda images: seen.append(len(images)) or features(images))
    engine = Engine(mllm, END_IDS, 12, 256)
    requests = mixed()
    list(engine.run([request for request in requests if not request.prompt.images]))
    assert not seen
    list(engine.run([request for request in requests if request.prompt.images]))
    assert seen and min(seen) > 0
