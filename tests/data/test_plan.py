import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from illume_lightning.data.bucket import Shapes, assign_buckets, merge_small_buckets
from illume_lightning.data.plan import DatasetSource, Phase, Plan, Schedule, interleave
from illume_lightning.resolution import any_resolution, nearest_ratio, ratio_sizes

MODES = ("fixed", "multi_ratio", "any_resolution")


def source(num_samples, name="a", weight=1.0, seed=0, low=40, high=300, per_chunk=7):
    sizes = np.random.default_rng(seed).integers(low, high, (num_samples, 2), dtype=np.int32)
    return DatasetSource(name, sizes, np.arange(num_samples, dtype=np.int32) // per_chunk, weight)


def steps(plan, start=0, stop=None):
    """Whole training steps as one device with one micro-batch per sample would read them."""
    result = []
    for step in range(start, plan.schedule.num_steps if stop is None else stop):
        phase = plan.schedule.phases[plan.schedule.phase_index(step)]
        batches = [plan.batch(step, micro, 0, 1) for micro in range(phase.accumulation(1))]
        result.append([item for batch in batches for item in batch])
    return result


def read(items):
    return [(item.dataset, item.index) for item in items]


@st.composite
def plans(draw):
    phases, until = [], 0
    for _ in range(draw(st.integers(1, 3))):
        until += draw(st.integers(1, 12))
        micro = draw(st.sampled_from([1, 2, 4]))
        phases.append(
            Phase(
                until,
                draw(st.sampled_from(MODES)),
                draw(st.sampled_from([32, 64, 128])),
                micro * 4 * draw(st.integers(1, 2)),
                micro,
            )
        )
    sources = [
        source(
            draw(st.integers(20, 90)), name, draw(st.sampled_from([0.5, 1.0, 3.0])), draw(st.integers(0, 9))
        )
        for name in "abc"[: draw(st.integers(1, 3))]
    ]
    return Plan(phases, sources, draw(st.integers(0, 3)), draw(st.sampled_from([1, 5, 4096])))


# -- the order --


def test_exact_order():
    phases = [Phase(2, "fixed", 32, 4, 2), Phase(4, "multi_ratio", 64, 4, 4)]
    plan = Plan(phases, [source(9, per_chunk=3), source(5, "b", 0.5, seed=1)], seed=7, shuffle_window=4)
    assert [read(step) for step in steps(plan)] == [
        [(0, 4), (1, 2), (0, 0), (0, 5)],
        [(0, 3), (1, 1), (1, 3), (0, 6)],
        [(1, 0), (0, 6), (1, 4), (0, 8)],
        [(1, 2), (0, 5), (1, 1), (1, 1)],
    ]
    assert [step[0].size for step in steps(plan)] == [(32, 32), (32, 32), (64, 64), (48, 64)]
    assert [item.sample_number for step in steps(plan) for item in step] == list(range(16))


@settings(deadline=None, max_examples=40)
@given(plans(), st.data())
def test_any_step_in_isolation_equals_the_sequence(plan, data):
    sequence = steps(plan)
    again = Plan(plan.schedule.phases, plan.datasets, plan.seed, plan.shuffle_window)
    for step in data.draw(st.permutations(range(plan.schedule.num_steps))):
        assert steps(again, step, step + 1)[0] == sequence[step]


@settings(deadline=None, max_examples=40)
@given(plans(), st.sampled_from([2, 4]))
def test_ranks_share_out_the_same_global_batch(plan, world_size):
    for step, whole in enumerate(steps(plan)):
        phase = plan.schedule.phases[plan.schedule.phase_index(step)]
        parts = [
            plan.batch(step, micro, rank, world_size)
            for micro in range(phase.accumulation(world_size))
            for rank in range(world_size)
        ]
        assert all(len(part) == phase.micro_batch_size for part in parts)
        assert [item for part in parts for item in part] == whole, "nothing twice, nothing missing"
        assert len({item.size for item in whole}) == 1, "all devices have one size"


@settings(deadline=None, max_examples=25)
@given(plans())
def test_micro_batch_size_does_not_change_the_global_batch(plan):
    whole = [Phase(p.until_step, p.mode, p.side, p.batch_size, p.batch_size) for p in plan.schedule.phases]
    again = Plan(whole, plan.datasets, plan.seed, plan.shuffle_window)
    assert steps(again) == steps(plan)


@settings(deadline=None, max_examples=25)
@given(plans())
def test_sample_numbers_count_through(plan):
    numbers = [item.sample_number for step in steps(plan) for item in step]
    assert numbers == list(range(len(numbers)))
    assert len(numbers) == sum(
        phase.batch_size * plan.schedule.steps_in(index) for index, phase in enumerate(plan.schedule.phases)
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("window", [1, 5, 4096])
def test_every_pass_of_a_lane_takes_every_sample_once(mode, window):
    plan = Plan([Phase(150, mode, 64, 8, 8)], [source(60), source(23, "b", 0.7, seed=3)], 1, window)
    taken = {}
    for step in steps(plan):
        for item in step:
            taken.setdefault((item.dataset, item.size), []).append(item.index)
    lanes = plan.lane_sizes(0)
    assert taken.keys() <= lanes.keys()
    assert sum(lanes.values()) == 83 - plan.num_excluded(0)
    num_passes = 0
    for lane, indices in taken.items():
        passes = [indices[k : k + lanes[lane]] for k in range(0, len(indices), lanes[lane])]
        assert all(len(set(one)) == len(one) for one in passes), "nothing twice, in the last, open pass too"
        complete = [one for one in passes if len(one) == lanes[lane]]
        assert all(sorted(one) == sorted(complete[0]) for one in complete)
        assert len(complete) < 6 or lanes[lane] == 1 or len({tuple(one) for one in complete}) > 1
        num_passes += len(complete)
    assert num_passes > 10


def test_small_datasets_are_fully_shuffled_and_large_ones_by_chunk_and_window():
    data = source(4000, per_chunk=50)
    phases = [Phase(500, "fixed", 64, 8, 8)]
    near = np.array([item.index for step in steps(Plan(phases, [data], 0, 100)) for item in step])
    assert sorted(near) == list(range(4000))
    # A window of 100 samples touches no more than 100 / 50 chunks, and 1 that is cut at its edge.
    assert max(len(set(near[k : k + 100] // 50)) for k in range(0, 4000, 100)) <= 3
    assert len(set((near // 50)[::100])) > 20, "chunks in no order"
    far = np.array([item.index for step in steps(Plan(phases, [data], 0, 4000)) for item in step])
    assert np.mean([len(set(far[k : k + 100] // 50)) for k in range(0, 4000, 100)]) > 50


def test_lanes_of_a_dataset_walk_through_its_chunks_together():
    data = source(6000, per_chunk=50)
    plan = Plan([Phase(750, "multi_ratio", 64, 8, 8)], [data], 0, 60)
    first_pass = [item.index // 50 for step in steps(plan, 0, 500) for item in step]
    touched = [len(set(first_pass[k : k + 400])) for k in range(0, 4000, 400)]
    assert max(touched) < 40, f"of 120 chunks; {touched}"


def test_seed_phase_and_pass_change_the_order():
    phase = [Phase(4, "fixed", 64, 20, 20), Phase(8, "fixed", 64, 20, 20)]
    first = [read(step) for step in steps(Plan(phase, [source(40)], 0))]
    other = [read(step) for step in steps(Plan(phase, [source(40)], 1))]
    orders = [first[0] + first[1], first[2] + first[3], first[4] + first[5], other[0] + other[1]]
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == sorted(orders[0]) for order in orders)


# -- the mixture --

rates = st.lists(st.floats(0.01, 10), min_size=1, max_size=6).map(np.array)


@given(rates, st.integers(0, 3000), st.integers(0, 60), st.integers(0, 5))
def test_interleave_is_the_same_from_anywhere(rates, start, length, key):
    lanes, events = interleave(rates, 0, start + length, (9, key))
    again = interleave(rates, start, start + length, (9, key))
    assert np.array_equal(again[0], lanes[start:])
    assert np.array_equal(again[1], events[start:])
    for lane in range(len(rates)):
        assert np.array_equal(events[lanes == lane], np.arange((lanes == lane).sum()))


@given(rates, st.integers(0, 5))
def test_interleave_keeps_shares_at_every_length(rates, key):
    lanes, _ = interleave(rates, 0, 1000, (9, key))
    shares = rates / rates.sum()
    counts = np.cumsum(lanes[:, None] == np.arange(len(rates)), axis=0)
    expected = np.arange(1, 1001)[:, None] * shares
    assert (np.abs(counts - expected) <= 1 + max(0, len(rates) - 2) * shares + 1e-9).all()


def test_interleave_is_irregular():
    lanes, _ = interleave(np.array([0.5, 0.5]), 0, 4000, (9, 0))
    assert 0.2 < np.mean(lanes[1:] == lanes[:-1]) < 0.8


@pytest.mark.parametrize("mode", ["fixed", "multi_ratio"])
def test_weights_are_shares_of_the_samples(mode):
    sources = [source(50, weight=3.0), source(400, "b", weight=1.0, seed=1)]
    plan = Plan([Phase(250, mode, 64, 16, 16)], sources)
    datasets = [item.dataset for step in steps(plan) for item in step]
    # Each of 11 sizes has its share to within a step, and within a size each dataset to within one sample.
    tolerance = 1 if mode == "fixed" else 11 * 16
    assert abs(np.sum(np.array(datasets) == 0) - 0.75 * 4000) <= tolerance


def test_sizes_appear_as_often_as_their_pictures():
    plan = Plan([Phase(400, "multi_ratio", 64, 16, 16)], [source(3000)])
    sizes = [step[0].size for step in steps(plan)]
    lanes = plan.lane_sizes(0)
    for (_, size), count in lanes.items():
        assert abs(sizes.count(size) - 400 * count / sum(lanes.values())) <= 1 + len(lanes) * count / 3000


# -- sizes --


def test_every_sample_gets_the_size_of_its_mode():
    data = source(400)
    for mode in MODES:
        plan = Plan([Phase(40, mode, 64, 4, 4)], [data])
        stretched = 0
        for item in (item for step in steps(plan) for item in step):
            height, width = map(int, data.sizes[item.index])
            stretched += item.stretch
            if mode == "fixed":
                assert item.size == (64, 64)
            elif mode == "multi_ratio":
                match = nearest_ratio(height, width, ratio_sizes(64))
                assert match.cropped <= 0.2
                assert match.size == item.size, "every bucket is large enough here"
            else:
                assert item.stretch == (item.size == any_resolution(height, width, 64))
        assert bool(stretched) == (mode == "any_resolution")


def test_multi_ratio_counts_what_it_leaves_out():
    sizes = np.array([(100, 100)] * 5 + [(100, 700)] * 3 + [(130, 100)] * 4, dtype=np.int32)
    data = DatasetSource("wide", sizes, np.zeros(12, dtype=np.int32))
    plan = Plan([Phase(4, "fixed", 64, 2, 2), Phase(20, "multi_ratio", 64, 2, 2)], [data])
    assert (plan.num_excluded(0), plan.num_excluded(1)) == (0, 3)
    assert "3 left out (cropped by more than 20%)" in plan.describe()
    assert {item.index for step in steps(plan, 4) for item in step} == {*range(5), *range(8, 12)}


def test_sizes_of_a_coarser_step():
    sizes = np.array([[100, 100], [60, 130], [130, 60], [96, 128]] * 4)
    dataset = DatasetSource("a", sizes, np.zeros(16, dtype=int))
    phase = Phase(4, "multi_ratio", 96, 2, 2, size_step=32)
    seen = {size for (_, size) in Plan([phase], [dataset]).lane_sizes(0)}
    assert seen == {(96, 96), (64, 128), (128, 64), (64, 96)}
    assert phase.max_area == max(h * w for h, w in ratio_sizes(96, 32)) == 64 * 192


def test_rare_sizes_stay_where_samples_cannot_change_theirs():
    sizes = np.array([[64, 64]] * 15 + [[64, 80]])
    dataset = DatasetSource("a", sizes, np.zeros(16, dtype=int))
    phase = Phase(4, "any_resolution", 80, 4, 4)
    assert set(Plan([phase], [dataset]).lane_sizes(0)) == {(0, (64, 64))}
    kept = Plan([phase], [dataset], merge_buckets=False).lane_sizes(0)
    assert kept == {(0, (64, 64)): 15, (0, (64, 80)): 1}


def test_a_phase_that_leaves_nothing_of_a_dataset_is_refused():
    data = DatasetSource("strips", np.full((3, 2), [10, 90], dtype=np.int32), np.zeros(3, dtype=np.int32))
    with pytest.raises(ValueError, match=r"phase 0 \(multi_ratio, 64 px\).*3 pictures of strips"):
        Plan([Phase(4, "multi_ratio", 64, 2, 2)], [source(20), data])


def test_small_buckets_merge_into_similar_ones():
    sizes = [(64, 64), (64, 80), (64, 96), (64, 256), (80, 64)]
    counts = np.array([50, 3, 40, 2, 4])
    aspects = np.array([w / h for h, w in sizes])
    merged = merge_small_buckets(sizes, counts, aspects, aspects, minimum=10)
    # 64 x 80 would lose exactly 20 % in 64 x 64, and is nearer to 64 x 96 (17 %); 80 x 64 loses 20 % in
    # 64 x 64; 64 x 256 would lose more than half anywhere.
    assert merged.tolist() == [0, 2, 2, 3, 0]


def test_merging_crops_no_picture_by_more_than_a_fifth():
    data = source(300, low=30, high=400)
    phase = Phase(10, "any_resolution", 256, 16, 16)
    shapes = Shapes.of(data.sizes)
    buckets = assign_buckets(phase, [shapes])
    assert buckets.num_merged[0] > 100
    assert buckets.counts.sum() == 300
    for (height, width), bucket in zip(shapes.sizes, buckets.of_shape[0], strict=True):
        size = buckets.sizes[bucket]
        if size != any_resolution(int(height), int(width), 256):
            aspect, target = width / height, size[1] / size[0]
            assert min(aspect, target) / max(aspect, target) >= 0.8


# -- the schedule --


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=4),
    st.sampled_from([1, 2, 4]),
)
def test_steps_and_micro_batches(phases, world_size):
    ends = np.cumsum([length for length, _, _ in phases])
    schedule = Schedule(
        [Phase(int(end), "fixed", 32, 4 * m * a, m) for end, (_, m, a) in zip(ends, phases, strict=True)]
    )
    micro = samples = 0
    for step in range(schedule.num_steps):
        phase = schedule.phases[schedule.phase_index(step)]
        assert schedule.first_step(schedule.phase_index(step)) <= step < phase.until_step
        assert schedule.first_micro_batch(step, world_size) == micro
        assert schedule.first_sample(step) == samples
        for number in range(phase.accumulation(world_size)):
            assert schedule.locate(micro, world_size) == (step, number, phase.accumulation(world_size))
            micro += 1
        samples += phase.batch_size
    assert schedule.num_micro_batches(world_size) == micro
    for outside in (-1, micro):
        with pytest.raises(ValueError, match=f"micro-batch {outside} is outside"):
            schedule.locate(outside, world_size)
    with pytest.raises(ValueError, match=f"training step {schedule.num_steps} is outside"):
        schedule.phase_index(schedule.num_steps)


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([], "no phases"),
        ([Phase(0, "fixed", 32, 4, 4)], "until_step 0 is not above 0"),
        ([Phase(9, "fixed", 32, 4, 4), Phase(9, "fixed", 64, 4, 4)], "phase 1: until_step 9 is not above 9"),
        ([Phase(9, "square", 32, 4, 4)], "mode 'square' is none of fixed, multi_ratio, any_resolution"),
        ([Phase(9, "fixed", 40, 4, 4)], "side 40 is not a positive multiple of 16"),
        ([Phase(9, "fixed", 0, 4, 4)], "side 0 is not a positive multiple of 16"),
        ([Phase(9, "any_resolution", 16, 4, 4)], "side 16 is below 32"),
        ([Phase(9, "fixed", 32, 0, 4)], "batch_size 0 is not positive"),
        ([Phase(9, "fixed", 32, 4, -1)], "micro_batch_size -1 is not positive"),
        (
            [Phase(9, "fixed", 32, 6, 4)],
            "batch_size of 6 and a micro_batch_size of 4, which does not divide 6: use 3 or 6",
        ),
        ([Phase(9, "fixed", 32, 4, 4, lr=0.0)], "lr 0.0 is not positive"),
        ([Phase(9, "fixed", 32, 4, 4, lr=1e-4), Phase(10, "fixed", 32, 4, 4)], "lr is given for some phases"),
        ([Phase(4, "multi_ratio", 64, 2, 2, size_step=24)], "size_step 24 is not a positive multiple of 16"),
        ([Phase(4, "fixed", 80, 2, 2, size_step=32)], "side 80 is not a positive multiple of 32"),
        ([Phase(4, "any_resolution", 64, 2, 2, size_step=32)], "size_step is 32; use multi_ratio"),
    ],
)
def test_contradictory_phases_are_refused(phases, message):
    with pytest.raises(ValueError, match=message):
        Schedule(phases)


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "message"),
    [
        (12, 4, 5, "which 5 processes .* use 4 or 6 processes .*, or a batch_size of 10 or 15"),
        (256, 4, 300, "use 256 processes .*, or a batch_size of 300"),
        (12, 4, 2, "6 for each of 2 processes, and a micro_batch_size of 4, .* use 3 or 6"),
        (12, 5, 1, " and a micro_batch_size of 5, which does not divide 12: use 4 or 6"),
    ],
)
def test_batches_that_do_not_divide(batch, micro, processes, message):
    with pytest.raises(ValueError, match=f"the phase until step 9 has a batch_size of {batch}.*{message}"):
        Phase(9, "fixed", 64, batch, micro).accumulation(processes)


def test_world_size_must_divide_the_batch():
    plan = Plan([Phase(5, "fixed", 32, 12, 4)], [source(20)])
    assert len(plan.batch(0, 0, 2, 3)) == 4
    with pytest.raises(ValueError, match="6 for each of 2 processes, and a micro_batch_size of 4"):
        plan.batch(0, 0, 0, 2)
    with pytest.raises(ValueError, match="micro-batch 1 of 1 on device 0 of 3"):
        plan.batch(0, 1, 0, 3)
    with pytest.raises(ValueError, match="on device 3 of 3"):
        plan.batch(0, 0, 3, 3)


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        ([], {}, "no datasets"),
        ([source(0)], {}, "dataset a is empty"),
        ([source(5, weight=0.0)], {}, "weight 0.0 is not positive"),
        (
            [DatasetSource("c", np.ones((4, 2), int), np.zeros(3, int))],
            {},
            r"shape \(4, 2\), expected \(3, 2\)",
        ),
        ([source(5)], {"seed": -1}, "seed -1 is negative"),
        ([source(5)], {"shuffle_window": 0}, "shuffle_window 0 is not positive"),
    ],
)
def test_contradictory_data_is_refused(sources, options, message):
    with pytest.raises(ValueError, match=message):
        Plan([Phase(5, "fixed", 32, 4, 4)], sources, **options)
