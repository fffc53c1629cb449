"""Memory, products, days and cost of a whole run."""

from collections.abc import Sequence
from dataclasses import dataclass

import lightning as L
from torch import nn

from illume_lightning.budget.devices import GIB, Device, find_device
from illume_lightning.budget.dry_step import Recorder, dry_step
from illume_lightning.budget.memory import Memory, Strategy, plan_memory
from illume_lightning.budget.run_model import RunModel, read_run
from illume_lightning.budget.sample_batch import sample_batch
from illume_lightning.data.packed_batch import PackedBatch
from illume_lightning.data.schedule import Phase

_HOURS_PER_DAY = 24


@dataclass(frozen=True)
class Hardware:
    """What the run is to train on."""

    device: Device

    devices: int
    """Of them, each a process."""

    strategy: Strategy

    mfu: float
    """Share of a device's speed that the products reach. What is computed again in the backward pass counts too."""

    price: float | None = None
    """Of a device for an hour, in any currency."""


@dataclass(frozen=True)
class Part:
    """Parameters of a part of the model."""

    name: str
    trained: int
    frozen: int


@dataclass(frozen=True)
class PhaseEstimate:
    """A phase of the curriculum."""

    phase: Phase
    steps: int
    accumulation: int
    """Micro-batches of a training step on every device."""

    tokens: int | None
    """Of the language model in a training step, on all devices; none where there is none."""

    flops: int
    """Operations of a training step on all devices."""

    memory: Memory

    seconds: float | None
    """Of a training step; none where the device's speed is not known for the precision."""

    @property
    def days(self) -> float | None:
        """Of the phase."""
        return None if self.seconds is None else self.seconds * self.steps / 86400


@dataclass(frozen=True)
class Estimate:
    """What a run needs."""

    hardware: Hardware
    precision: str
    parts: list[Part]
    phases: list[PhaseEstimate]

    @property
    def largest(self) -> PhaseEstimate:
        """The phase that needs most memory."""
        return max(self.phases, key=lambda phase: phase.memory.peak)

    @property
    def fits(self) -> bool:
        """Whether every phase fits a device's memory."""
        return self.largest.memory.needed <= self.hardware.device.memory_gib * GIB

    @property
    def days(self) -> float | None:
        """Of all phases."""
        days = [phase.days for phase in self.phases]
        return None if None in days else sum(day for day in days if day is not None)

    @property
    def cost(self) -> float | None:
        """Of all devices, in the price's currency."""
        if self.hardware.price is None or self.days is None:
            return None
        return self.days * _HOURS_PER_DAY * self.hardware.devices * self.hardware.price


def estimate(files: Sequence[str], hardware: Hardware, curriculum: type[L.Callback]) -> Estimate:
    """Plan a run; nothing but its YAML is read.

    Args:
        files: as ``read_run``.
        hardware: to train on.
        curriculum: as ``read_run``.

    Raises:
        ArgumentError: as ``read_run``.
        FileNotFoundError: as ``read_run``.
        ValueError: as ``read_run``, or if the model's step fails with its precision.
    """
    run = read_run(files, curriculum, hardware.devices, hardware.strategy)
    phases = [_phase(run, number, hardware) for number in range(len(run.schedule.phases))]
    return Estimate(hardware, run.precision_name, _parts(run), phases)


def _phase(run: RunModel, number: int, hardware: Hardware) -> PhaseEstimate:
    phase, steps = run.schedule.phases[number], run.schedule.steps_in(number)
    accumulation = phase.accumulation(hardware.devices)
    batch = sample_batch(run.module, phase, run.data, run.fake)
    tokens = None
    if isinstance(batch, PackedBatch):
        tokens = int((batch.document_ids >= 0).sum()) * accumulation * hardware.devices
    try:
        cost = dry_step(
            run.module,
            batch,
            phase.until_step,
            run.precision,
            Recorder(run.fake),
            accumulates=accumulation > 1,
            shards=hardware.strategy == "fsdp2",
        )
    except RuntimeError as error:  # torch's, such as weights in half precision that meet pictures in fp32
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"a training step of {type(run.module).__name__} fails with {run.precision_name}: {reason}"
        ) from error
    memory = plan_memory(
        run.module,
        cost,
        hardware.devices,
        hardware.strategy,
        run.precision,
        averages=run.averages,
        accumulates=accumulation > 1,
    )
    seconds = None
    if run.precision_name != "32-true":
        seconds = cost.flops * accumulation / (hardware.device.tflops * 1e12 * hardware.mfu)
    flops = cost.flops * accumulation * hardware.devices
    return PhaseEstimate(phase, steps, accumulation, tokens, flops, memory, seconds)


def _parts(run: RunModel) -> list[Part]:
    """Parameters of the model's parts, of other trained networks, and of fixed ones."""
    module = run.module
    networks = dict(module.model.named_children())
    networks |= {name: child for name, child in module.named_children() if name != "model"}
    parts = [Part(name, *_counts(network)) for name, network in networks.items()]
    parts += [Part(f"{name} (fixed)", *_counts(network)) for name, network in module.fixed.items()]
    own = [p for network in (module, module.model) for p in network.parameters(recurse=False)]
    if own:
        parts.append(Part("other", sum(p.numel() for p in own if p.requires_grad), 0))
    return [part for part in parts if part.trained or part.frozen]


def _counts(network: nn.Module) -> tuple[int, int]:
    sizes = [(p.requires_grad, p.numel()) for p in network.parameters()]
    return sum(size for trains, size in sizes if trains), sum(size for trains, size in sizes if not trains)


def check_hardware(
    device: str, devices: int, strategy: Strategy, mfu: float, price: float | None
) -> Hardware:
    """What was asked for.

    Raises:
        ValueError: if a device is unknown or a number is out of range.
    """
    found = find_device(device)
    if devices < 1:
        raise ValueError(f"devices is {devices}: give the number of accelerators, at least 1")
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu is {mfu}: give a share of the device's speed above 0 and up to 1, such as 0.4")
    if price is not None and not 0 <= price < float("inf"):
        raise ValueError(f"price is {price}: give what a device costs for an hour")
    return Hardware(found, devices, strategy, mfu, price)
