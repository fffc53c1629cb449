"""What determinism costs: training steps with `trainer.deterministic` false, warn and true, in turns.

    python benchmarks/determinism.py [--device cpu] [--rounds 5] [--steps 10] [--threads 2]
    python benchmarks/determinism.py --size toy --rounds 1 --steps 2

The modules of experiments/shapes under the Trainer, bf16, on made-up batches; one process, so that the ratios to
`false`, of the fastest rounds, are those of one machine in one hour. With `true` all rounds must give the same losses
bit for bit, or the benchmark fails. An operation that has no deterministic kernel on the device is named instead of
timed. With --size toy nothing is written.
"""

import argparse
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import record
from benchmarks.modules import Losses
from benchmarks.shapes_modules import PARTS, build
from benchmarks.steps import train
from callbacks import ResolutionCurriculum
from illume_lightning.data.schedule import Phase
from illume_lightning.host_memory import keep_freed_memory

LEVELS: tuple[Any, ...] = (False, "warn", True)
"""Of ``trainer.deterministic``."""


def measure(name: str, level: Any, args: argparse.Namespace) -> tuple[float, list[float]]:
    """Seconds of a step after the first two, and the losses of all."""
    part, losses, steps = build(name, args.size == "toy"), Losses(), args.steps + 2
    batches = part.batches(part.phase.micro_batch_size, steps)
    batches = tree_map_only(torch.Tensor, lambda tensor: tensor.to(args.device), batches)
    size = part.phase.micro_batch_size
    whole = Phase(steps, part.phase.mode, part.phase.side, size, size, part.phase.size_step)
    torch.manual_seed(0)
    timing = train(
        part.module,
        batches,
        warmup=2,
        steps=args.steps,
        callbacks=[ResolutionCurriculum([whole]), losses],
        accelerator=args.device,
        devices=1,
        precision="bf16-mixed",
        deterministic=level,
    )
    return timing.seconds, torch.stack(losses.found).tolist()


def compare(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """All levels in turns; of a level that the device can't do, why."""
    seconds: dict[str, list[float]] = {str(level): [] for level in LEVELS}
    losses: dict[str, list[list[float]]] = {str(level): [] for level in LEVELS}
    refused: dict[str, str] = {}
    for number in range(args.rounds):
        for level in LEVELS if number % 2 == 0 else reversed(LEVELS):
            key = str(level)
            if key in refused:
                continue
            try:
                taken, found = measure(name, level, args)
            except RuntimeError as error:  # torch's, which names the operation
                if "deterministic" not in str(error):
                    raise
                refused[key] = str(error).splitlines()[0][:120]
                continue
            seconds[key].append(taken)
            losses[key].append(found)
    if any(found != losses["True"][0] for found in losses["True"]):
        sys.exit(f"{name}: with deterministic true, rounds differ: {losses['True']}")
    fastest = {key: min(found) for key, found in seconds.items() if found}
    return {
        "seconds": {key: [round(value, 5) for value in found] for key, found in seconds.items()},
        "ratio": {key: round(value / fastest["False"], 4) for key, value in fastest.items()},
        "rounds_equal": {key: all(f == found[0] for f in found) for key, found in losses.items() if found},
        "refused": refused,
    }


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["dualvitok", "mllm_stage2"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="that are timed in a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", choices=["full", "toy"], default="full")
    args = parser.parse_args()
    if min(args.rounds, args.steps, args.threads) < 1:
        parser.error("--rounds, --steps and --threads: give at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here; take cpu")
    started_on = record.hardware()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    results = {name: compare(name, args) for name in args.parts}
    rows = [["", "deterministic", "s/step", "ratio", "rounds equal"]]
    for name, found in results.items():
        for key in map(str, LEVELS):
            if key in found["refused"]:
                rows.append([name, key.lower(), found["refused"][key], "", ""])
                continue
            equal = "bit for bit" if found["rounds_equal"][key] else "no"
            rows.append(
                [name, key.lower(), f"{min(found['seconds'][key]):.4f}", f"{found['ratio'][key]:.3f}", equal]
            )
    print(record.table(rows))
    if args.size == "full":
        print(f"wrote {record.write('determinism', {'settings': vars(args), **results}, started_on)}")


if __name__ == "__main__":
    main()
