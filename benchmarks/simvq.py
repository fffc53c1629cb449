"""Nearest-code search: ours against torch.cdist + argmin in blocks of 32,768 codes (official release).

    python benchmarks/simvq.py [--codes 98304] [--tokens 16384] [--dim 32] [--threads 2] [--repeats 3]

Each variant runs in its own process, so that its peak memory is its own. Both must find the same codes.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import record
from illume_lightning.nn.simvq import _products, nearest_code

BLOCK = 32768


def blockwise_cdist(x: Tensor, codebook: Tensor) -> Tensor:
    """Nearest codes (N,) through distance matrices of 32,768 codes at a time."""
    distances, indices = [], []
    for start in range(0, len(codebook), BLOCK):
        block = torch.cdist(x, codebook[start : start + BLOCK])
        index = block.argmin(1, keepdim=True)
        distances.append(block.gather(1, index))
        indices.append(index + start)
    nearest = torch.cat(distances, 1).argmin(1, keepdim=True)
    return torch.cat(indices, 1).gather(1, nearest)[:, 0]


VARIANTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ours": nearest_code, "cdist": blockwise_cdist}


def peak_mib() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def seconds(function: Callable[[], Any], repeats: int) -> list[float]:
    """Wall time of each call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return times


def measure(variant: str, args: argparse.Namespace) -> dict[str, Any]:
    """One variant in this process: seconds of each call, extra peak memory, and the sum of the indices."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    x = torch.randn(args.tokens, args.dim) * args.dim**-0.5
    codebook = torch.randn(args.codes, args.dim) * args.dim**-0.5
    VARIANTS[variant](x[:256], codebook[:1024])
    before = peak_mib()
    found: list[Tensor] = []
    times = seconds(lambda: found.append(VARIANTS[variant](x, codebook)), args.repeats)
    return {
        "seconds": times,
        "extra_mib": peak_mib() - before,
        "checksum": int((found[-1] * (x[:, 0] > 0)).sum()),
    }


def matmul_flops(args: argparse.Namespace) -> dict[str, float]:
    """GFLOP/s of fp32 products here: torch.mm and the search's own product, on squares and on its tiles."""
    torch.set_num_threads(args.threads)
    products = {"torch.mm": lambda a, b: torch.mm(a, b.t()), "search": _products}
    rates = {}
    for shape, (m, k, n) in {"square": (4096, 4096, 4096), "tile": (2048, args.dim + 1, 512)}.items():
        a, b = torch.randn(m, k), torch.randn(n, k)
        calls = max(1, int(4e10 / (2 * m * k * n)))
        for name, product in products.items():

            def run(
                product: Callable[[Tensor, Tensor], Tensor] = product, a: Tensor = a, b: Tensor = b
            ) -> None:
                for _ in range(calls):  # noqa: B023
                    product(a, b)

            run()
            rates[f"{name} {shape}"] = round(2 * m * k * n * calls / min(seconds(run, 3)) / 1e9, 1)
    return rates


def main() -> None:
    """Run all variants and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--codes", type=int, default=98304)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--variant", choices=[*VARIANTS, "matmul"], help="run this one here and print JSON")
    args = parser.parse_args()
    if args.variant:
        result = matmul_flops(args) if args.variant == "matmul" else measure(args.variant, args)
        print(json.dumps(result))
        return
    started_on = record.hardware()
    runs = {}
    for variant in (*VARIANTS, "matmul"):
        command = [sys.executable, *sys.argv, "--variant", variant]
        runs[variant] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    report(args, runs, started_on)


def report(args: argparse.Namespace, runs: dict[str, Any], started_on: dict[str, Any]) -> None:
    """Compare the runs, print them and write them."""
    ours, cdist, rates = runs["ours"], runs["cdist"], runs["matmul"]
    if ours["checksum"] != cdist["checksum"]:
        print("note: the two found different codes; fp32 distances of near-ties decide differently")
    gflop = 2 * args.codes * args.tokens * args.dim / 1e9
    best = {name: min(runs[name]["seconds"]) for name in VARIANTS}
    rate = {name: gflop / best[name] for name in VARIANTS}
    results = {
        "codes": args.codes,
        "tokens": args.tokens,
        "dim": args.dim,
        "threads": args.threads,
        "seconds": {name: runs[name]["seconds"] for name in VARIANTS},
        "extra_mib": {name: round(runs[name]["extra_mib"], 1) for name in VARIANTS},
        "speedup": round(best["cdist"] / best["ours"], 2),
        "same_codes": ours["checksum"] == cdist["checksum"],
        "gflops": {name: round(value, 1) for name, value in rate.items()},
        "product_gflops": rates,
        "share_of_torch_mm": round(rate["ours"] / rates["torch.mm square"], 3),
        "share_of_fastest_product": round(rate["ours"] / max(rates.values()), 3),
        "limit": "the fp32 product of all tokens and codes, with a short inner dimension; then its maxima",
    }
    rows = [["", "seconds", "extra MiB", "GFLOP/s"]]
    for name in VARIANTS:
        rows.append([name, f"{best[name]:.2f}", f"{runs[name]['extra_mib']:.0f}", f"{rate[name]:.0f}"])
    rows += [[name, "", "", f"{value:.0f}"] for name, value in rates.items()]
    print(record.table(rows))
    print(
        f"{results['speedup']}x faster than blockwise cdist; {results['share_of_torch_mm']:.0%} of torch.mm's"
        f" FLOP/s, {results['share_of_fastest_product']:.0%} of the fastest fp32 product's."
    )
    print(f"wrote {record.write('simvq', results, started_on)}")


if __name__ == "__main__":
    main()
