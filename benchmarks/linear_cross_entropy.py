"""Loss of a segmented head, forward + backward: ours against all logits at once and torch's chunked one.

    python benchmarks/linear_cross_entropy.py [--tokens 2048] [--rows 284000] [--hidden 256] [--dtype float32]
        [--device cpu] [--chunk 256] [--threads 2] [--repeats 3] [--keep-memory]

The head is two parameters, text (as many rows as Qwen2.5 has ids) and vision; the others concatenate them, ours
does not. Each variant runs in its own process, so that its peak memory is its own. Losses and gradients must agree,
or the benchmark fails.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import record
from illume_lightning.host_memory import keep_freed_memory
from illume_lightning.nn.linear_cross_entropy import linear_cross_entropy

TEXT_ROWS = 151_665


def full_logits(hidden: Tensor, tables: list[Tensor], targets: Tensor, chunk: int) -> Tensor:
    """All logits, softmax in fp32."""
    return F.cross_entropy(F.linear(hidden, torch.cat(tables)).float(), targets)


def torch_chunked(hidden: Tensor, tables: list[Tensor], targets: Tensor, chunk: int) -> Tensor:
    """torch.nn.functional.linear_cross_entropy at a given chunk size (its own choice is far slower on a CPU)."""
    options = LinearCrossEntropyOptions(batch_chunk_size=chunk, chunking_method=None)
    return F.linear_cross_entropy(hidden, torch.cat(tables), targets, options=options)


def ours(hidden: Tensor, tables: list[Tensor], targets: Tensor, chunk: int) -> Tensor:
    """Ours, at the chunk size that it chooses."""
    return linear_cross_entropy(hidden, tables, targets).loss


VARIANTS: dict[str, Callable[[Tensor, list[Tensor], Tensor, int], Tensor]] = {
    "full logits": full_logits,
    "torch chunked": torch_chunked,
    "ours": ours,
}


def problem(args: argparse.Namespace) -> tuple[Tensor, list[Tensor], Tensor]:
    """Hidden states, text and vision table, and targets, one in sixteen of which is ignored."""
    generator = torch.Generator().manual_seed(0)
    text = min(TEXT_ROWS, args.rows // 2)

    def leaf(rows: int, scale: float) -> Tensor:
        values = torch.randn(rows, args.hidden, generator=generator) * scale
        return values.to(args.device, getattr(torch, args.dtype)).requires_grad_()

    tables = [leaf(rows, args.hidden**-0.5) for rows in (text, args.rows - text)]
    targets = torch.randint(args.rows, (args.tokens,), generator=generator)
    targets[::16] = -100
    return leaf(args.tokens, 1.0), tables, targets.to(args.device)


def peak_mib(device: str) -> float:
    """Largest memory so far: resident memory of this process, or what is allocated on the accelerator."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(variant: str, args: argparse.Namespace) -> dict[str, Any]:
    """One variant in this process: seconds of each call, extra peak memory, loss and gradient norms."""
    torch.set_num_threads(args.threads)
    if args.keep_memory:
        keep_freed_memory()
    hidden, tables, targets = problem(args)
    leaves = [hidden, *tables]

    def step() -> float:
        for leaf in leaves:
            leaf.grad = None
        loss = VARIANTS[variant](hidden, tables, targets, args.chunk)
        loss.backward()
        # Also waits for the device.
        return loss.item()

    small = [leaf.detach()[:64].requires_grad_() for leaf in leaves]
    VARIANTS[variant](small[0], small[1:], torch.zeros_like(targets[:64]), 16).backward()
    before = peak_mib(args.device)
    times = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        loss = step()
        times.append(time.perf_counter() - start)
    return {
        "seconds": times,
        "extra_mib": peak_mib(args.device) - before,
        "loss": loss,
        "gradient_norms": [leaf.grad.float().norm().item() for leaf in leaves],
    }


def main() -> None:
    """Run all variants and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=284_000, help="of both tables")
    parser.add_argument("--hidden", type=int, default=256, help="width of the hidden states")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--chunk", type=int, default=256, help="tokens per chunk of torch's")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--keep-memory", action="store_true", help="keep freed memory, as `illume fit` does")
    parser.add_argument("--variant", choices=VARIANTS, help="run this one here and print JSON")
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(measure(args.variant, args)))
        return
    started_on = record.hardware()
    runs = {}
    for variant in VARIANTS:
        command = [sys.executable, *sys.argv, "--variant", variant]
        runs[variant] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    report(args, runs, started_on)


def disagreement(runs: dict[str, Any]) -> float:
    """Largest relative difference of any variant's loss and gradient norms from those of all logits."""
    reference, *others = ([run["loss"], *run["gradient_norms"]] for run in runs.values())
    return max(abs(a / b - 1) for other in others for a, b in zip(other, reference, strict=True))


def report(args: argparse.Namespace, runs: dict[str, Any], started_on: dict[str, Any]) -> None:
    """Compare the runs, print them and write them; fail where they disagree."""
    median = {name: statistics.median(run["seconds"]) for name, run in runs.items()}
    extra = {name: run["extra_mib"] for name, run in runs.items()}
    # Three products, each of all tokens, ids and dimensions.
    gflop = 3 * 2 * args.tokens * args.rows * args.hidden / 1e9
    results = {
        "settings": {key: value for key, value in vars(args).items() if key != "variant"},
        "variants": runs,
        "median_seconds": {name: round(value, 3) for name, value in median.items()},
        "gflops": {name: round(gflop / value, 1) for name, value in median.items()},
        "time_of_ours": {name: round(median["ours"] / median[name], 3) for name in runs if name != "ours"},
        "memory_of_ours": {
            name: round(extra["ours"] / max(extra[name], 1), 3) for name in runs if name != "ours"
        },
        "relative_difference": disagreement(runs),
    }
    rows = [["", "seconds", "GFLOP/s", "extra MiB", "loss"]]
    for name, run in runs.items():
        rate = results["gflops"][name]
        rows.append([name, f"{median[name]:.2f}", f"{rate:.0f}", f"{extra[name]:.0f}", f"{run['loss']:.6f}"])
    print(record.table(rows))
    print(
        f"Ours takes {results['time_of_ours']['full logits']:.2f}x the time and"
        f" {results['memory_of_ours']['full logits']:.2f}x the extra memory of all logits at once."
    )
    print(f"wrote {record.write('linear_cross_entropy', results, started_on)}")
    if results["relative_difference"] > (1e-4 if args.dtype == "float32" else 2e-2):
        sys.exit(f"losses or gradients disagree by {results['relative_difference']:.1e}")


if __name__ == "__main__":
    main()
