"""What one accelerator does: training of all parts, generation, and what each option for speed gives.

    python benchmarks/gpu.py [--device cuda] [--parts dualvitok decoder mllm generation] [--minutes 8]
    python benchmarks/gpu.py --device cpu --size toy

Real training steps of the LightningModules under the Trainer, bf16-mixed, on made-up batches that lie on the device:
the tokenizer of the paper with LPIPS and discriminator, SDXL's UNet behind the frozen tokenizer and VAE, and stage 2
of the MLLM with Qwen2.5's trunks of 0.5B and 3B, on packed conversations that edit a picture. Weights are random,
which takes as long.

MFU is the share of the data sheet's dense bf16 speed (illume_lightning/budget/devices.py) that the step's products
reach, counted by torch's flop counter while the step runs; recomputed ones count. Options are given as time without
over time with them, above 1 is faster. What runs out of memory or time is recorded as such, and the rest goes on; all
of it ends after --minutes. With --size toy nothing is written.
"""

import argparse
import gc
import logging
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import gpu_models, record
from benchmarks.steps import GIB, picture_batch, train, wait
from callbacks import TF32
from illume_lightning.budget.devices import DEVICES
from illume_lightning.budget.sample_batch import sample_batch
from illume_lightning.data.schedule import Phase
from illume_lightning.image_layout import image_layout
from illume_lightning.lit.training import TrainingModule
from illume_lightning.nn.answer import Prompt, Request
from illume_lightning.nn.generation import Engine
from illume_lightning.resolution import Size, any_resolution

PARTS = ("dualvitok", "decoder", "mllm", "generation")
PICTURES = ((640, 480), (480, 640), (1024, 768), (400, 600), (500, 500), (500, 1200))
"""Sizes of pictures as they are found, for training at any resolution."""

FUSED: dict[str, Any] = {"optimizer": partial(torch.optim.AdamW, lr=1e-4, weight_decay=0.0, fused=True)}
OPTIONS: dict[str, dict[str, Any]] = {
    "channels_last": {"channels_last": True},
    "TF32": {},
    "fused AdamW": FUSED,
    "checkpoint_activations": {"checkpoint_activations": True},
    "compile": {"compile": True},
}
SPARING = {"checkpoint_activations": True} | FUSED
"""Options of what is large."""


@dataclass(frozen=True)
class Case:
    """A training to time."""

    part: str
    what: str
    build: Callable[..., TrainingModule]
    batches: Callable[[TrainingModule], list[Any]]
    unit: str = "images"
    options: dict[str, Any] = field(default_factory=dict)
    tries: tuple[str, ...] = ()
    """Options to try."""

    @property
    def name(self) -> str:
        """In the tables."""
        return f"{self.part}, {self.what}"


@dataclass(frozen=True)
class Plan:
    """How long everything may take."""

    device: str
    is_toy: bool
    ends: float
    """When, by the monotonic clock."""

    @property
    def steps(self) -> int:
        """That are timed."""
        return 2 if self.is_toy else 8

    def seconds(self, option: str | None) -> float:
        """For one case."""
        wanted = 100.0 if option == "compile" else 45.0
        return min(wanted, self.ends - time.monotonic())


def cases(is_toy: bool) -> list[Case]:
    """All trainings; the first one of each part tries its options."""
    tokenizer, decoder, mllm = (
        partial(build, is_toy) for build in (gpu_models.dualvitok, gpu_models.decoder, gpu_models.mllm)
    )
    small, large = (32, 64) if is_toy else (256, 512)
    few = 1 if is_toy else 2
    many = 4 * few
    found = [
        Case(
            "dualvitok",
            f"{small} px, batch {many}",
            tokenizer,
            pictures(many, (small, small)),
            tries=tuple(OPTIONS),
        ),
        Case("dualvitok", f"{large} px, batch {few}", tokenizer, pictures(few, (large, large))),
    ]
    mixed = [any_resolution(*size, large) for size in PICTURES]
    found.append(
        Case("dualvitok", f"any size up to {large} px, batch {few}", tokenizer, pictures(few, *mixed))
    )
    small, large = (64, 96) if is_toy else (512, 1024)
    for side, count, options, tries in ((small, many // 2, {}, tuple(OPTIONS)), (large, 1, SPARING, ())):
        batches, what = pictures(count, (side, side)), f"{side} px, batch {count}"
        found.append(Case("decoder", what, partial(decoder, side), batches, "images", options, tries))
    row_tokens = 512 if is_toy else 4096
    of_trunk = tuple(name for name in OPTIONS if name != "channels_last")
    for trunk, rows, options, tries in (("0.5B", 2, {}, of_trunk), ("3B", 1, SPARING, ())):
        conversations = partial(edits, 32 if is_toy else 256, row_tokens, rows)
        what = f"{trunk}, {rows} x {row_tokens} tokens at most"
        found.append(Case("mllm", what, partial(mllm, trunk), conversations, "tokens", options, tries))
    return found


def pictures(count: int, *sizes: Size) -> Callable[[TrainingModule], list[Any]]:
    """Batches of each size."""
    return lambda module: [picture_batch(count, size, seed) for seed, size in enumerate(sizes)]


def edits(side: int, row_tokens: int, rows: int, module: Any) -> list[Any]:
    """A batch that fills so many rows with edits of pictures whose codes are cached."""
    data = {"row_tokens": row_tokens, "train": {"editing": {"tokens": ["cached"]}}}
    one = sample_batch(module, Phase(1, "fixed", side, 1, 1), data, None)
    count = row_tokens // int((one.document_ids >= 0).sum()) * rows  # type: ignore[union-attr]
    batch: Any = sample_batch(module, Phase(1, "fixed", side, count, count), data, None)
    noise = [torch.randint_like(images, 256) for images in batch.images]
    return [batch._replace(images=noise)]


@contextmanager
def time_box(seconds: float) -> Iterator[None]:
    """Raise a TimeoutError in what takes longer."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"took longer than {seconds:.0f} s")

    if seconds <= 1:
        raise TimeoutError("no time was left")
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(run: Callable[[], dict[str, Any]], seconds: float) -> dict[str, Any]:
    """What came out, or why nothing did; the device's memory is free again."""
    try:
        with time_box(seconds):
            found = run()
    except torch.OutOfMemoryError:
        found = {"error": "out of memory"}
    except (RuntimeError, TimeoutError, ValueError, ImportError) as error:
        found = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def time_case(case: Case, plan: Plan, option: str | None) -> dict[str, Any]:
    """Build, train, measure."""
    options = case.options | (OPTIONS[option] if option else {})
    torch.manual_seed(0)
    with torch.device(plan.device):
        module = case.build(**options)
    batches = [to_device(batch, plan.device) for batch in case.batches(module)]
    timing = train(
        module,
        batches,
        warmup=len(batches) + 2,
        steps=-(-plan.steps // len(batches)) * len(batches),
        counts_flops=option is None,
        callbacks=[TF32()] if option == "TF32" and plan.device == "cuda" else [],
        accelerator=plan.device,
        devices=1,
        precision="bf16-mixed",
    )
    amounts = [
        int((batch.document_ids >= 0).sum()) if case.unit == "tokens" else len(batch.images)
        for batch in batches
    ]
    return asdict(timing) | {f"{case.unit}_per_s": sum(amounts) / len(amounts) / timing.seconds}


def to_device(batch: Any, device: str) -> Any:
    """The same batch there, as Lightning brings it."""
    from lightning.pytorch.utilities import move_data_to_device

    return move_data_to_device(batch, torch.device(device))


def time_generation(plan: Plan, batch: int) -> dict[str, Any]:
    """Pictures of one size side by side, with guidance, bf16."""
    if plan.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with torch.device(plan.device):
        mllm = gpu_models.mllm(plan.is_toy, "0.5B").model.requires_grad_(False).eval()
    for parameter in mllm.parameters():
        parameter.data = parameter.data.bfloat16()
    layout = image_layout((32, 32) if plan.is_toy else (256, 256), mllm.vocabulary)
    prompts = []
    for count in (48, 16):
        ids = [0] * count + [*layout.size_tokens]
        prompts.append(Prompt(ids, [0] * len(ids)))
    conditional, unconditional = prompts
    engine = Engine(mllm, [], 2 * batch, len(conditional.ids) + layout.length)
    seconds = 0.0
    for _ in range(2):  # the first one warms up
        requests = [
            Request(conditional, layout=layout, unconditional=unconditional, seed=seed)
            for seed in range(batch)
        ]
        began = time.perf_counter()
        for _update in engine.run(requests):
            pass
        wait(torch.device(plan.device))
        seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() / GIB if plan.device == "cuda" else None
    rate = {"tokens_per_s": batch * layout.length / seconds, "s_per_image": seconds / batch}
    return {"seconds": seconds, **rate, "peak_gib": peak}


def peak_speed(device: str) -> float | None:
    """Dense bf16 operations a second by the data sheet, where it is one that is known."""
    if device != "cuda":
        return None
    name = torch.cuda.get_device_name().lower().replace(" ", "")
    return next((known.tflops * 1e12 for key, known in DEVICES.items() if key in name), None)


def measure(plan: Plan, parts: Sequence[str]) -> dict[str, Any]:
    """Trainings, generation, and then the options, of which compiling takes longest."""
    peak = peak_speed(plan.device)
    chosen = [case for case in cases(plan.is_toy) if case.part in parts]
    training: dict[str, Any] = {}
    for case in chosen:
        found = attempt(partial(time_case, case, plan, None), plan.seconds(None))
        if peak and found.get("flops"):
            found["mfu"] = found["flops"] / found["seconds"] / peak
        training[case.name] = report(case.name, found)
    generation = {}
    for batch in (1, 8, 32) if "generation" in parts else ():
        found = attempt(partial(time_generation, plan, batch), plan.seconds(None))
        generation[f"batch {batch}"] = report(f"generation, batch {batch}", found)
    options: dict[str, Any] = {case.name: {} for case in chosen if case.tries}
    for option in OPTIONS:
        for case in (case for case in chosen if option in case.tries):
            found = attempt(partial(time_case, case, plan, option), plan.seconds(option))
            if "seconds" in found and "seconds" in training[case.name]:
                found["speed_up"] = training[case.name]["seconds"] / found["seconds"]
            options[case.name][option] = report(f"{case.name}: {option}", found)
    sheet = None if peak is None else peak / 1e12
    return {"peak_tflops": sheet, "training": training, "generation": generation, "options": options}


def report(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """Say it at once, as what follows may take minutes."""
    print(f"{name}: {found}", file=sys.stderr, flush=True)
    return found


def markdown(results: dict[str, Any]) -> str:
    """All figures as tables."""
    rows = [["training", "images/s", "tokens/s", "s/step", "MFU", "peak GiB"]]
    for name, found in results["training"].items():
        rows.append([name, *cells(found, "images_per_s", "tokens_per_s", "seconds", "mfu", "peak_gib")])
    tables = [table(rows)]
    rows = [["option", "times as fast", "peak GiB"]]
    for name, options in results["options"].items():
        rows += [
            [f"{name}: {option}", *cells(found, "speed_up", "peak_gib")] for option, found in options.items()
        ]
    tables.append(table(rows))
    rows = [["generation", "tokens/s", "s/image", "peak GiB"]]
    for name, found in results["generation"].items():
        rows.append([name, *cells(found, "tokens_per_s", "s_per_image", "peak_gib")])
    return "\n\n".join([*tables, table(rows)])


def cells(found: dict[str, Any], *keys: str) -> list[str]:
    """Figures with three digits, or the error in the first cell."""
    if "error" in found:
        return [found["error"], *[""] * (len(keys) - 1)]
    return ["" if found.get(key) is None else f"{found[key]:.3g}" for key in keys]


def table(rows: list[list[str]]) -> str:
    """Rows in Markdown, the first one a heading."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(rows[0]) - 1), *lines[1:]])


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--size", choices=["full", "toy"], default="full")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--minutes", type=float, default=7.5, help="when it ends; what is left is recorded as such"
    )
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "--device cuda: torch finds no GPU here; use --device cpu --size toy, or see `illume doctor`"
        )
    started_on = record.hardware()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    if args.size == "toy":
        torch.compiler.set_stance("force_eager")  # kernels take a minute
    plan = Plan(args.device, args.size == "toy", time.monotonic() + 60 * args.minutes)
    results = measure(plan, args.parts)
    print(markdown(results))
    if args.size == "full":
        print(f"\nwrote {record.write('gpu', results, started_on)}")


if __name__ == "__main__":
    main()
