import random

import numpy as np
import pytest

from illume_lightning.data import packing
from illume_lightning.data.packing import (
    ConversationSource,
    PackPlan,
    evaluation_batches,
    image_size,
    pack,
)
from illume_lightning.data.schedule import Phase
from illume_lightning.image_layout import image_layout
from illume_lightning.vocabulary import Vocabulary

VOCABULARY = Vocabulary(num_text=50, semantic_codes=8, pixel_codes=16, size_step=16)
FIXED = Phase(6, "fixed", 64, 8, 2)


def source(name="mixed", count=40, seed=0, weight=1.0, sizes=((64, 64), (128, 64)), longest=60):
    """Conversations of which every third has no image, and every other third generates one."""
    draw = random.Random(seed)
    images, first = [], [0]
    for number in range(count):
        if number % 3:
            height, width = draw.choice(sizes)
            images.append((number % 3 == 1, height, width, 2 if number % 3 == 1 else 0))
        first.append(len(images))
    text = np.array([draw.randrange(5, longest) for _ in range(count)])
    return ConversationSource(
        name,
        text,
        text // 2,
        np.array(first),
        np.array(images).reshape(-1, 4),
        np.arange(count) // 10,
        weight,
    )


@pytest.mark.parametrize("seed", range(20))
def test_packing_keeps_every_sample_whole(seed):
    draw = random.Random(seed)
    lengths = [draw.randrange(1, 100) for _ in range(draw.randrange(6, 60))]
    multiple = draw.choice([1, 2, 3, 6])
    rows = pack(lengths, 100, multiple)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    filled = [sum(lengths[number] for number in row) for row in rows]
    assert max(filled) <= 100 and all(rows) and len(rows) % multiple == 0
    assert filled == sorted(filled, reverse=True)


def test_rows_are_about_equal_and_few():
    draw = random.Random(1)
    lengths = [draw.randrange(20, 120) for _ in range(200)]
    filled = [sum(lengths[number] for number in row) for row in pack(lengths, 512)]
    assert len(filled) <= 1.4 * sum(lengths) / 512
    assert 1 - sum(filled) / (len(filled) * max(filled)) < 0.02


def test_lengths_follow_from_the_layouts():
    plan = PackPlan([FIXED], [source()], VOCABULARY, row_tokens=400)
    given = plan.sources[0]
    image = image_layout((64, 64), VOCABULARY).length
    for item in plan.samples(0):
        has_image = item.index % 3 > 0
        mentions = 4 if item.index % 3 == 1 else 0
        assert item.length == given.num_text[item.index] + (image + mentions if has_image else 0)
    total = plan.batch(0, 0, 0, 1).num_supervised
    assert total == sum(
        given.num_supervised[item.index] + (image + 2 if item.index % 3 == 1 else 0)
        for item in plan.samples(0)
    )


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_devices_share_a_step_whatever_their_number(world_size):
    plan = PackPlan([FIXED], [source(), source("other", seed=3, weight=2.0)], VOCABULARY, row_tokens=300)
    for step in range(6):
        groups = [
            plan.batch(step, number, rank, world_size)
            for number in range(FIXED.accumulation(world_size))
            for rank in range(world_size)
        ]
        read = [item for group in groups for row in group.rows for item in row]
        assert sorted(read) == sorted(plan.samples(step))
        assert len({group.num_supervised for group in groups}) == 1
        assert len({len(group.rows) for group in groups}) == 1
        assert all(sum(item.length for item in row) <= 300 for group in groups for row in group.rows)


def test_a_step_is_packed_once_for_all_its_micro_batches(monkeypatch):
    plan = PackPlan([Phase(8, "fixed", 64, 12, 3)], [source()], VOCABULARY, row_tokens=200)
    packed = []
    monkeypatch.setattr(packing, "pack", lambda *arguments: packed.append(1) or pack(*arguments))
    for step in range(3):
        for number in range(4):
            plan.batch(step, number, 0, 1)
    assert len(packed) == 3


def test_every_pass_takes_each_conversation_once():
    plan = PackPlan([Phase(10, "fixed", 64, 8, 8)], [source(count=40)], VOCABULARY, row_tokens=400)
    items = [item for step in range(10) for item in plan.samples(step)]
    assert [item.sample_number for item in items] == list(range(80))
    for start in (0, 40):
        assert sorted(item.index for item in items[start : start + 40]) == list(range(40))
    again = PackPlan([Phase(10, "fixed", 64, 8, 8)], [source(count=40)], VOCABULARY, row_tokens=400)
    assert again.samples(7) == items[56:64]
    other = PackPlan([Phase(10, "fixed", 64, 8, 8)], [source(count=40)], VOCABULARY, row_tokens=400, seed=1)
    assert other.samples(7) != items[56:64]


def test_what_is_too_long_is_left_out_phase_by_phase():
    phases = [Phase(4, "fixed", 64, 4, 4), Phase(8, "fixed", 128, 4, 4)]
    plan = PackPlan(phases, [source(longest=10)], VOCABULARY, row_tokens=60)
    assert {item.index % 3 for step in range(4) for item in plan.samples(step)} == {0, 1, 2}
    assert {item.index % 3 for step in range(4, 8) for item in plan.samples(step)} == {0}
    first, second = (line for line in plan.describe().splitlines() if line.startswith("  mixed"))
    assert "40 conversations, 0 left out" in first
    assert "14 conversations, 26 left out" in second


def test_strong_crops_are_left_out():
    phase = Phase(4, "multi_ratio", 64, 4, 4)
    assert image_size(phase, True, 64, 1024) is None
    assert image_size(phase, True, 100, 100).size == (64, 64)
    plan = PackPlan([phase], [source(sizes=((64, 64), (64, 1024)), longest=10)], VOCABULARY, row_tokens=200)
    sizes = plan.sources[0].images
    owner = np.repeat(np.arange(40), np.diff(plan.sources[0].first_image))
    cropped = set(owner[sizes[:, 2] == 1024].tolist())
    assert cropped and not cropped & {item.index for step in range(4) for item in plan.samples(step)}


def test_any_resolution_generates_at_ratios():
    phase = Phase(4, "any_resolution", 128, 4, 4, generation_side=64)
    assert image_size(phase, False, 100, 52).size == (96, 48) and image_size(phase, False, 100, 52).stretch
    assert image_size(phase, True, 100, 52).size == (96, 48) and not image_size(phase, True, 100, 52).stretch
    with pytest.raises(ValueError, match="generation_side 64 goes with any_resolution, the mode is fixed"):
        PackPlan([Phase(4, "fixed", 64, 4, 4, generation_side=64)], [source()], VOCABULARY, 400)


def test_a_row_shorter_than_any_image():
    images = ConversationSource(
        "pictures", np.array([5]), np.array([2]), np.array([0, 1]), np.array([[1, 64, 64, 2]]), np.array([0])
    )
    length = 5 + image_layout((64, 64), VOCABULARY).length + 4
    with pytest.raises(ValueError, match=f"leaves nothing of pictures: it needs at least {length} tokens"):
        PackPlan([Phase(1, "fixed", 64, 1, 1)], [images], VOCABULARY, row_tokens=length - 1)
    PackPlan([Phase(1, "fixed", 64, 1, 1)], [images], VOCABULARY, row_tokens=length)


def test_what_cannot_come_out_even():
    assert pack([60] * 4, 100, 2) == [[0], [1], [2], [3]]
    with pytest.raises(ValueError, match="5 conversations can't fill a multiple of 2 rows of 100 tokens"):
        pack([60] * 5, 100, 2)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_takes_every_conversation_once(world_size):
    given = source()
    shares = [
        evaluation_batches(FIXED, given, VOCABULARY, 300, 2, None, rank, world_size)
        for rank in range(world_size)
    ]
    assert len({len(share) for share in shares}) == 1
    read = [item.index for share in shares for batch in share for row in batch.rows for item in row]
    assert sorted(read) == list(range(40))
    assert max(len(batch.rows) for share in shares for batch in share) <= 2
    limited = evaluation_batches(FIXED, given, VOCABULARY, 300, 2, 10, 0, 1)
    assert sorted(item.index for batch in limited for row in batch.rows for item in row) == list(
        range(0, 40, 4)
    )
