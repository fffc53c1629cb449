"""What a checkpoint costs: seconds for a GiB (write, hash, fsync), and its share of training at the paper's intervals.

    python benchmarks/checkpoints.py [--gib 1] [--rounds 5] [--folder .]
    python benchmarks/checkpoints.py --size toy --rounds 1

The same tensors are written by Lightning's TorchCheckpointIO, by ours, by ours without the hash, and by ours in the
background, in turns; of the latter only what training waits for is counted. Shares are computed, not measured: sizes
are given ones (a trained parameter with AdamW's moments takes 12 bytes in fp32), and a step is taken to last a second.
With --size toy nothing is written to benchmarks/results.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import record
from illume_lightning import durable_file
from illume_lightning.lit.durable_checkpoints import BackgroundCheckpointIO, DurableCheckpointIO

GIB = 2**30
EXPERIMENTS = Path(__file__).parents[1] / "experiments" / "paper"
SIZES_GIB = (1.0, 10.0, 36.0)
"""Of checkpoints whose shares are computed; 36 GiB are 3.2 billion trained parameters."""


class NoHash:
    """In the place of hashlib's."""

    def update(self, data: Any) -> None:
        """Nothing."""

    def hexdigest(self) -> str:
        """None either."""
        return "0" * 64


def seconds(save: Callable[[], None]) -> float:
    """Of one call."""
    began = time.perf_counter()
    save()
    return time.perf_counter() - began


def measure(folder: Path, gib: float, rounds: int) -> dict[str, list[float]]:
    """Seconds for a GiB of each way, in turns."""
    num_tensors = 64
    size = int(gib * GIB / 4 / num_tensors)
    content = {"state_dict": {f"weight{n}": torch.randn(size) for n in range(num_tensors)}}
    path, ours, background = folder / "step=1.ckpt", DurableCheckpointIO(), BackgroundCheckpointIO()

    def unhashed() -> None:
        with patch.object(durable_file.hashlib, "sha256", NoHash):
            ours.save_checkpoint(content, path)

    ways: dict[str, Callable[[], None]] = {
        "Lightning's": lambda: TorchCheckpointIO().save_checkpoint(content, path),
        "ours": lambda: ours.save_checkpoint(content, path),
        "ours, no hash": unhashed,
        "background": lambda: background.save_checkpoint(content, path),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, save in ways.items():
            found[name].append(round(seconds(save) / gib, 4))
            background.finish()
            durable_file.remove(path)
    background.teardown()
    return found


def intervals() -> dict[str, int]:
    """Training steps between the paper's checkpoints."""
    found = {}
    for file in sorted(EXPERIMENTS.glob("*.yaml")):
        trainer = yaml.safe_load(file.read_text()).get("trainer", {})
        for callback in trainer.get("callbacks", []):
            if callback["class_path"] == "callbacks.Checkpoint":
                found[file.stem] = callback["init_args"]["every_n_train_steps"]
    return found


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=1.0, help="size of the checkpoint that is written")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=".", help="on the disk to measure")
    parser.add_argument("--size", choices=["full", "toy"], default="full")
    args = parser.parse_args()
    if args.rounds < 1 or args.gib <= 0:
        parser.error("--rounds: give at least 1; --gib: more than 0")
    started_on = record.hardware()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = measure(Path(folder), 0.01 if args.size == "toy" else args.gib, args.rounds)
    rows = [["", "s/GiB, fastest", "slowest"]]
    rows += [[name, f"{min(taken):.3f}", f"{max(taken):.3f}"] for name, taken in found.items()]
    print(record.table(rows))
    rate = min(found["ours"])
    shares = {
        part: {f"{gib:g} GiB": round(rate * gib / every, 6) for gib in SIZES_GIB}
        for part, every in intervals().items()
    }
    rows = [["computed: share, steps of 1 s", *(f"{gib:g} GiB" for gib in SIZES_GIB)]]
    rows += [[part, *(f"{share:.2%}" for share in row.values())] for part, row in shares.items()]
    print(record.table(rows))
    if args.size == "full":
        results = {
            "settings": vars(args),
            "seconds_per_gib": found,
            "steps_between_checkpoints": intervals(),
            "computed_share_at_1s_steps": shares,
        }
        print(f"wrote {record.write('checkpoints', results, started_on)}")


if __name__ == "__main__":
    main()
