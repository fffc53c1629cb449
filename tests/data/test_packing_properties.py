"""Rows of any conversations: nothing is cut or lost, no row is too long, and a step is what it is from anywhere."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from illume_lightning.data.packing import ConversationSource, PackPlan, pack
from illume_lightning.data.schedule import Phase
from illume_lightning.vocabulary import Vocabulary

VOCABULARY = Vocabulary(num_text=50, semantic_codes=8, pixel_codes=16, size_step=16)
ROW = 150


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=60), st.integers(60, 200), st.integers(1, 4))
def test_rows_hold_everything_once_within_the_budget(
    lengths: list[int], capacity: int, multiple: int
) -> None:
    lengths = lengths[: len(lengths) - len(lengths) % multiple] or lengths[:1] * multiple
    rows = pack(lengths, capacity, multiple)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    filled = [sum(lengths[number] for number in row) for row in rows]
    assert max(filled) <= capacity and filled == sorted(filled, reverse=True)
    assert len(rows) % multiple == 0 and all(rows)
    assert rows == pack(list(lengths), capacity, multiple)


@st.composite
def sources(draw: st.DrawFn, name: str) -> ConversationSource:
    count = draw(st.integers(8, 30))
    random = np.random.default_rng(draw(st.integers(0, 999)))
    has_image = random.integers(0, 2, count)
    is_made = random.integers(0, 2, has_image.sum())
    sides = random.choice([16, 32, 48], (has_image.sum(), 2))
    text = random.integers(1, 60, count)
    images = np.column_stack([is_made, sides, 2 * is_made])
    first = np.concatenate([[0], np.cumsum(has_image)])
    weight = draw(st.sampled_from([0.3, 1.0, 4.0]))
    return ConversationSource(name, text, text // 2, first, images, np.arange(count) // 5, weight)


@st.composite
def plans(draw: st.DrawFn) -> tuple[PackPlan, PackPlan]:
    """The same plan twice."""
    phases, until = [], 0
    for _ in range(draw(st.integers(1, 3))):
        until += draw(st.integers(1, 5))
        micro = draw(st.sampled_from([1, 2]))
        phases.append(Phase(until, draw(st.sampled_from(["fixed", "any_resolution"])), 32, 8 * micro, micro))
    given = [draw(sources(name)) for name in "ab"[: draw(st.integers(1, 2))]]
    order = draw(st.integers(0, 5)), draw(st.sampled_from([1, 5, 4096]))
    return PackPlan(phases, given, VOCABULARY, ROW, *order), PackPlan(phases, given, VOCABULARY, ROW, *order)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(plans(), st.sampled_from([1, 2, 4, 8]), st.data())
def test_a_step_is_the_same_from_anywhere_on_any_devices(
    both: tuple[PackPlan, PackPlan], world_size: int, data: st.DataObject
) -> None:
    plan, again = both
    num_steps = plan.schedule.num_steps
    whole = [plan.samples(step) for step in range(num_steps)]
    assert [item.sample_number for step in whole for item in step] == list(range(sum(map(len, whole))))
    for step in data.draw(st.permutations(range(num_steps))):
        phase = plan.schedule.phases[plan.schedule.phase_index(step)]
        groups = [
            again.batch(step, number, rank, world_size)
            for number in range(phase.accumulation(world_size))
            for rank in range(world_size)
        ]
        read = [item for group in groups for row in group.rows for item in row]
        assert sorted(read) == sorted(whole[step])
        assert len({group.num_supervised for group in groups}) == 1
        assert all(sum(item.length for item in row) <= ROW for group in groups for row in group.rows)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.tuples(sources("a"), sources("b")), st.integers(0, 5))
def test_datasets_have_their_shares(mixed: tuple[ConversationSource, ConversationSource], seed: int) -> None:
    plan = PackPlan([Phase(40, "fixed", 32, 16, 16)], mixed, VOCABULARY, ROW, seed)
    taken = [item.dataset for step in range(40) for item in plan.samples(step)]
    share = mixed[1].weight / (mixed[0].weight + mixed[1].weight)
    for stop in (16, 100, 640):
        assert abs(sum(taken[:stop]) - share * stop) <= 1
