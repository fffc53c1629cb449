"""The phases of a progressive run (paper 3.4): arithmetic between steps, micro-batches and samples."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, NamedTuple, get_args

from illume_lightning.resolution import PIXEL_STRIDE, Size, ratio_sizes

SizeMode = Literal["fixed", "multi_ratio", "any_resolution"]


@dataclass(frozen=True)
class Phase:
    """A stretch of training steps with one way of choosing picture sizes and one batch size."""

    until_step: int
    """The phase ends before this training step; it begins where the one before it ends."""

    mode: SizeMode
    """`fixed`: every picture is `side` x `side`. `multi_ratio`: the nearest of 11 aspect ratios near that
    area, without pictures that this would crop by more than 20 %. `any_resolution`: a picture's own size,
    rounded to multiples of 16 and at most that area."""

    side: int
    """Square root of the (largest) area, in pixels; a multiple of 16."""

    batch_size: int
    """Samples in a training step, over all devices and micro-batches: the paper's batch size."""

    micro_batch_size: int
    """Samples in one forward pass on one device; the rest of `batch_size` is devices and accumulation."""

    size_step: int = PIXEL_STRIDE
    """Both sides of every picture are multiples of this many pixels: 16, or 32 for the diffusion decoder,
    whose codes stand for half the size."""

    lr: float | None = None
    """Learning rate of every parameter group in this phase; none leaves the optimizers as they are."""

    generation_side: int | None = None
    """With `any_resolution` and conversations: pictures that are generated or edited take the nearest of the 11
    ratios near this side squared instead; none takes `side`."""

    @property
    def largest_size(self) -> Size:
        """Height and width of the phase's largest picture, in pixels; of any resolution a square one."""
        if self.mode != "multi_ratio":
            return self.side, self.side
        return max(ratio_sizes(self.side, self.size_step), key=prod)

    @property
    def max_area(self) -> int:
        """Pixels of the phase's largest picture."""
        return prod(self.largest_size)

    @property
    def generating(self) -> "Phase":
        """The sizes that pictures to generate or edit have in this phase, as a phase; equal where they are."""
        mode, side = self.mode, self.side
        if mode == "any_resolution":
            mode, side = "multi_ratio", self.generation_side or self.side
        return Phase(1, mode, side, 1, 1, self.size_step)

    def accumulation(self, world_size: int) -> int:
        """Micro-batches that every device runs for one training step.

        Raises:
            ValueError: if devices or micro-batches can't share `batch_size` evenly; names the nearest numbers that can.
        """
        batch, micro = self.batch_size, self.micro_batch_size
        where = f"the phase until step {self.until_step} has a batch_size of {batch}"
        share, left = divmod(batch, world_size)
        if left:
            batches = _nearest(batch, (share * world_size, (share + 1) * world_size))
            raise ValueError(
                f"{where}, which {world_size} processes can't share evenly: use "
                f"{_nearest(world_size, _divisors(batch))} processes (trainer.devices x trainer.num_nodes), or a "
                f"batch_size of {batches}"
            )
        if share % micro:
            processes = f", {share} for each of {world_size} processes," if world_size > 1 else ""
            raise ValueError(
                f"{where}{processes} and a micro_batch_size of {micro}, which does not divide {share}: use "
                f"{_nearest(micro, _divisors(share))}"
            )
        return share // micro


class MicroBatch(NamedTuple):
    """Place of a micro-batch: its training step, its number within the step, and how many the step has."""

    step: int
    number: int
    accumulation: int


class Schedule:
    """The phases of a run in order.

    Samples, micro-batches and steps are counted from 0 over the whole run. `world_size` is the number of
    devices that read different data.

    Args:
        phases: at least one, with rising `until_step`.

    Raises:
        ValueError: if the phases contradict themselves; names the phase and the value.
    """

    def __init__(self, phases: Sequence[Phase]) -> None:
        _check(phases)
        self.phases = tuple(phases)
        self._ends = [phase.until_step for phase in self.phases]

    @property
    def num_steps(self) -> int:
        """Training steps of the whole run."""
        return self._ends[-1]

    def phase_index(self, step: int) -> int:
        """Number of the phase that a training step belongs to.

        Raises:
            ValueError: if the run has no such step.
        """
        if not 0 <= step < self.num_steps:
            raise ValueError(f"training step {step} is outside the schedule of {self.num_steps} steps")
        return bisect_right(self._ends, step)

    def first_step(self, index: int) -> int:
        """First training step of a phase."""
        return self._ends[index - 1] if index else 0

    def steps_in(self, index: int) -> int:
        """Training steps of a phase."""
        return self._ends[index] - self.first_step(index)

    def first_sample(self, step: int) -> int:
        """Running number of a training step's first sample: how many samples come before it."""
        return self._before(step, [phase.batch_size for phase in self.phases])

    def first_micro_batch(self, step: int, world_size: int) -> int:
        """Running number, on every device, of a training step's first micro-batch."""
        return self._before(step, [phase.accumulation(world_size) for phase in self.phases])

    def num_micro_batches(self, world_size: int) -> int:
        """Micro-batches of the whole run on every device."""
        return self.first_micro_batch(self.num_steps, world_size)

    def locate(self, micro_batch: int, world_size: int) -> MicroBatch:
        """Training step of a micro-batch; the inverse of `first_micro_batch`.

        Raises:
            ValueError: if the run has no such micro-batch.
        """
        before = 0
        for index, phase in enumerate(self.phases):
            count = phase.accumulation(world_size)
            within = micro_batch - before
            if 0 <= within < count * self.steps_in(index):
                return MicroBatch(self.first_step(index) + within // count, within % count, count)
            before += count * self.steps_in(index)
        raise ValueError(f"micro-batch {micro_batch} is outside the schedule of {before} micro-batches")

    def _before(self, step: int, per_step: list[int]) -> int:
        """Sum of a count that is constant within phases, over the training steps before `step`."""
        steps = (min(step, end) - self.first_step(index) for index, end in enumerate(self._ends))
        return sum(max(0, number) * each for number, each in zip(steps, per_step, strict=True))


def _check(phases: Sequence[Phase]) -> None:
    if not phases:
        raise ValueError("the schedule has no phases; give at least one")
    previous = 0
    for index, phase in enumerate(phases):
        name = f"phase {index}"
        if phase.mode not in get_args(SizeMode):
            raise ValueError(f"{name}: mode {phase.mode!r} is none of {', '.join(get_args(SizeMode))}")
        if phase.until_step <= previous:
            raise ValueError(
                f"{name}: until_step {phase.until_step} is not above {previous}, where the phase begins; "
                "list the phases in order, each with the training step at which it ends"
            )
        if phase.size_step < PIXEL_STRIDE or phase.size_step % PIXEL_STRIDE:
            raise ValueError(
                f"{name}: size_step {phase.size_step} is not a positive multiple of {PIXEL_STRIDE}"
            )
        if phase.side < phase.size_step or phase.side % phase.size_step:
            raise ValueError(
                f"{name}: side {phase.side} is not a positive multiple of {phase.size_step} pixels"
            )
        if phase.mode == "any_resolution" and phase.size_step != PIXEL_STRIDE:
            raise ValueError(
                f"{name}: any_resolution rounds to {PIXEL_STRIDE} pixels, size_step is {phase.size_step}; "
                "use multi_ratio"
            )
        if phase.generation_side is not None and phase.mode != "any_resolution":
            raise ValueError(
                f"{name}: generation_side {phase.generation_side} goes with any_resolution, the mode is {phase.mode}"
            )
        if phase.mode == "any_resolution" and phase.side < 32:
            raise ValueError(f"{name}: side {phase.side} is below 32 pixels, the least for any_resolution")
        for field in ("batch_size", "micro_batch_size"):
            if getattr(phase, field) < 1:
                raise ValueError(f"{name}: {field} {getattr(phase, field)} is not positive")
        phase.accumulation(world_size=1)
        if phase.lr is not None and not phase.lr > 0:
            raise ValueError(f"{name}: lr {phase.lr} is not positive")
        previous = phase.until_step
    if len({phase.lr is None for phase in phases}) > 1:
        raise ValueError("lr is given for some phases only; give it for all of them or for none")


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _nearest(wanted: int, numbers: Iterable[int]) -> str:
    """The largest below and the smallest above, where there are such: ``4 or 6``."""
    numbers = [number for number in numbers if number > 0]
    found = [
        max((n for n in numbers if n <= wanted), default=0),
        min((n for n in numbers if n >= wanted), default=0),
    ]
    return " or ".join(str(number) for number in dict.fromkeys(found) if number)
