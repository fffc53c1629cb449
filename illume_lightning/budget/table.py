"""An estimate as Markdown for people, and as JSON for programs."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from illume_lightning.budget.devices import GIB
from illume_lightning.budget.estimate import Estimate, PhaseEstimate
from illume_lightning.budget.memory import ALLOWANCE

_MEMORY_ROWS = {
    "weights": "weights",
    "gathered": "weights gathered for use",
    "fixed": "fixed networks",
    "average": "average of the weights",
    "gradients": "gradients",
    "buckets": "DDP's copies of them",
    "optimizer": "optimizer's moments",
    "activations": "activations",
    "peak": "**peak**",
}


def markdown(estimate: Estimate) -> str:
    """Tables of parameters, memory and time, and a line with the result."""
    hardware = estimate.hardware
    where = f"{hardware.devices} x {hardware.device.name}, {hardware.strategy}"
    head = f"{where}, {estimate.precision}, MFU {hardware.mfu:g}"
    sections = [head, _parts(estimate), _memory(estimate.largest), _phases(estimate), _result(estimate)]
    return "\n\n".join(sections) + "\n"


def record(estimate: Estimate) -> dict[str, Any]:
    """All numbers, in bytes, seconds and operations."""
    whole = asdict(estimate)
    for section, phase in zip(whole["phases"], estimate.phases, strict=True):
        section["days"] = phase.days
        section["memory"]["needed"] = phase.memory.needed
    return {**whole, "fits": estimate.fits, "days": estimate.days, "cost": estimate.cost}


def write_json(estimate: Estimate, file: str) -> None:
    """Write the record to a file."""
    Path(file).write_text(json.dumps(record(estimate), indent=1) + "\n")


def _parts(estimate: Estimate) -> str:
    parts = estimate.parts
    rows = [(part.name, f"{part.trained:,}", f"{part.frozen:,}") for part in parts]
    total = sum(part.trained for part in parts), sum(part.frozen for part in parts)
    return _table(("part", "trained", "frozen"), [*rows, ("**all**", *(f"{count:,}" for count in total))])


def _memory(largest: PhaseEstimate) -> str:
    sizes = vars(largest.memory)
    rows = [(title, f"{sizes[name] / GIB:.2f}") for name, title in _MEMORY_ROWS.items() if sizes[name]]
    return _table(("memory of a device", "GiB"), rows)


def _phases(estimate: Estimate) -> str:
    has_tokens = any(phase.tokens for phase in estimate.phases)
    rows = []
    for number, found in enumerate(estimate.phases):
        phase = found.phase
        rows.append(
            (
                f"{number}: {phase.mode} {phase.side} px",
                f"{found.steps:,}",
                f"{phase.batch_size:,} = {estimate.hardware.devices} x {phase.micro_batch_size} x {found.accumulation}",
                *([f"{found.tokens:,}"] if has_tokens else []),
                f"{found.flops / 1e15:.3g}",
                f"{found.memory.peak / GIB:.1f}",
                "-" if found.seconds is None else f"{found.seconds:.3g}",
                "-" if found.days is None else f"{found.days:.2f}",
            )
        )
    titles = ("phase", "steps", "batch = devices x micro x accumulation")
    tokens = ("tokens a step",) if has_tokens else ()
    return _table((*titles, *tokens, "PFLOP a step", "peak GiB", "s a step", "days"), rows)


def _result(estimate: Estimate) -> str:
    device, memory = estimate.hardware.device, estimate.largest.memory
    fit = "Fits" if estimate.fits else "**Does not fit**"
    line = (
        f"{fit}: {memory.peak / GIB:.1f} GiB and {ALLOWANCE / GIB:.0f} for what is not planned, of "
        f"{device.memory_gib:g} GiB."
    )
    if estimate.days is None:
        return f"{line} Speed is known for bf16 and fp16 only: no days for {estimate.precision}."
    line += f" {estimate.days:.1f} days."
    return line if estimate.cost is None else f"{line} Cost: {estimate.cost:,.0f}."


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
