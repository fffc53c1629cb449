"""Training on two processes with a core each (DDP over gloo) against one process on one core: samples a second.

    python benchmarks/ddp.py [--rounds 3] [--steps 10]
    python benchmarks/ddp.py --size toy --rounds 1 --steps 2

The modules of experiments/shapes, bf16, on made-up batches of their sizes. A training step has the same batch with one
process, which takes it in two micro-batches, and with two, which take one each and exchange gradients. Both run in
turns; 2 would be perfect, and less where both cores share what memory gives. With --size toy nothing is written.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import record
from benchmarks.shapes_modules import build
from benchmarks.steps import train
from callbacks import ResolutionCurriculum
from illume_lightning.data.schedule import Phase
from illume_lightning.host_memory import keep_freed_memory

PARTS = ("dualvitok", "mllm_stage2")
MARK = "seconds of a training step: "


def work(args: argparse.Namespace) -> None:
    """Train in this process, and by Lightning's launcher in one more; the first one prints the time."""
    # The second process is a child of the first, and would be bound to its core.
    cores = os.environ.setdefault(
        "BENCHMARK_CORES", " ".join(map(str, sorted(os.sched_getaffinity(0))))
    ).split()
    os.sched_setaffinity(0, {int(cores[int(os.environ.get("LOCAL_RANK", "0")) % len(cores)])})
    torch.set_num_threads(1)
    keep_freed_memory()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    part = build(args.part, args.size == "toy")
    phase, steps = part.phase, args.steps + 2
    micro = phase.batch_size // 2
    whole = Phase(steps, phase.mode, phase.side, 2 * micro, micro, phase.size_step)
    count = 2 // args.devices
    timing = train(
        part.module,
        part.batches(micro, count),
        warmup=2,
        steps=args.steps,
        callbacks=[ResolutionCurriculum([whole])],
        micro_batches=count,
        accelerator="cpu",
        devices=args.devices,
        strategy="ddp" if args.devices > 1 else "auto",
        precision="bf16-mixed",
    )
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(MARK + json.dumps({"seconds": timing.seconds * count, "samples": 2 * micro}), flush=True)


def measure(part: str, devices: int, args: argparse.Namespace) -> float:
    """Samples a second of a run in processes of its own."""
    options = ["--part", part, "--devices", str(devices), "--steps", str(args.steps), "--size", args.size]
    done = subprocess.run([sys.executable, __file__, *options], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not lines:
        sys.exit(
            f"{part} on {devices} processes failed: {(done.stderr.strip() or 'no output').splitlines()[-1]}"
        )
    found = json.loads(lines[-1].removeprefix(MARK))
    return found["samples"] / found["seconds"]


def compare(part: str, args: argparse.Namespace) -> dict[str, Any]:
    """One process and two, in turns."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(args.rounds):
        for devices, found in rates.items():
            found.append(measure(part, devices, args))
    return {
        "samples_per_s": {
            str(devices): [round(rate, 3) for rate in found] for devices, found in rates.items()
        },
        "speed_up": round(max(rates[2]) / max(rates[1]), 3),
    }


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="training steps that are timed in a round")
    parser.add_argument("--size", choices=["full", "toy"], default="full")
    parser.add_argument("--part", choices=PARTS, help="run this one here and print its time")
    parser.add_argument("--devices", type=int, choices=[1, 2], default=1, help="with --part")
    args = parser.parse_args()
    if min(args.rounds, args.steps) < 1:
        parser.error("--rounds and --steps: give at least 1")
    if args.part:
        work(args)
        return
    cores = len(os.sched_getaffinity(0))
    if cores < 2:
        print(
            f"this process may use {cores} core: two processes share it, and nothing is written",
            file=sys.stderr,
        )
    started_on = record.hardware()
    results = {part: compare(part, args) for part in args.parts}
    rows = [["", "1 process, samples/s", "2 processes, samples/s", "speed-up"]]
    for part, found in results.items():
        fastest = [f"{max(rates):.2f}" for rates in found["samples_per_s"].values()]
        rows.append([part, *fastest, f"{found['speed_up']:.2f}"])
    print(record.table(rows))
    if args.size == "full" and cores > 1:
        print(f"wrote {record.write('ddp', {'settings': vars(args), **results}, started_on)}")


if __name__ == "__main__":
    main()
