"""What the LightningModules cost under the Trainer: their step against a bare loop of the same step.

    python benchmarks/modules.py [--rounds 5] [--steps 10] [--threads 2]
    python benchmarks/modules.py --size toy --rounds 1 --steps 2

The modules of experiments/shapes with the callbacks and loggers of their YAML (without those that only validate or
predict), and bare loops with the same model, batches, optimizers, losses, clipping and schedules, bf16 on the CPU.
Both run in turns in one process; the ratio is that of their fastest rounds, 1.05 is the target. The first losses of
both must agree, or the benchmark fails. With --size toy nothing is written.
"""

import argparse
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import record
from benchmarks.shapes_modules import PARTS, Part, build
from benchmarks.steps import train
from callbacks import ExactResume, PhaseProgressBar, ResolutionCurriculum, Throughput
from illume_lightning.data.schedule import Phase
from illume_lightning.host_memory import keep_freed_memory
from illume_lightning.lit.dualvitok import to_float
from illume_lightning.lit.metrics_logger import MetricsLogger
from illume_lightning.nn.draws import SampleDraws

TARGET = 1.05
ALIKE = 4
"""Steps whose losses must agree."""


def loss_of(name: str, module: Any, batch: Any) -> Tensor:
    """What a training step minimises, by calls of the model alone."""
    if name == "dualvitok":
        images = to_float(batch.images)
        output = module.model(images, None, SampleDraws(0, batch.sample_number.tolist()))
        return module.loss.generator(images, output)["loss"]
    if name == "diffusion_decoder":
        tokenizer, draws = module.fixed["tokenizer"], SampleDraws(0, batch.sample_number.tolist())
        images = to_float(batch.images)
        with torch.no_grad():
            codes = module.noise.replace(module.encode(images), tokenizer, draws)
            features = module.noise.drop(tokenizer.code_features(codes), tokenizer, draws)
            latents = module.model.latents.encode(images)
        return module.model.loss(latents, features, draws).mean()
    return module.model(
        ids=batch.ids,
        position_ids=batch.position_ids,
        document_ids=batch.document_ids,
        images=[to_float(images) for images in batch.images],
        semantic_slots=batch.semantic_slots,
        pixel_slots=batch.pixel_slots,
        target_positions=batch.target_positions,
        targets=batch.ids.flatten()[batch.target_positions + 1],
        weights=torch.full(batch.target_positions.shape, 1 / batch.num_supervised),
        slot_ids=batch.slot_ids,
    ).loss


class Bare:
    """A training loop with nothing around it.

    Args:
        part: whose model, optimizers and schedules it takes.
    """

    def __init__(self, part: Part) -> None:
        self.name, self.module = part.name, part.module
        configured: Any = part.module.configure_optimizers()
        self.optimizers, self.schedules = configured

    def run(self, batches: Sequence[Any]) -> list[float]:
        """A step for each batch; their losses."""
        self.module.train()
        losses = []
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(self.name, self.module, batch)
            loss.backward()
            for optimizer in self.optimizers:
                parameters = [p for group in optimizer.param_groups for p in group["params"]]
                nn.utils.clip_grad_norm_(parameters, self.module.gradient_clip)
                optimizer.step()
                optimizer.zero_grad()
            for schedule in self.schedules:
                schedule.step()
            losses.append(loss.detach())
        return torch.stack(losses).tolist()


class Losses(L.Callback):
    """Of all steps."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Keep this step's."""
        self.found.append(trainer.callback_metrics["train/loss"])


def bare_seconds(name: str, args: argparse.Namespace) -> tuple[float, list[float]]:
    """Of a step after the first two, and the losses."""
    part = build(name, args.size == "toy")
    batches = part.batches(part.phase.micro_batch_size, args.steps + 2)
    bare = Bare(part)
    losses = bare.run(batches[:2])
    began = time.perf_counter()
    losses += bare.run(batches[2:])
    return (time.perf_counter() - began) / args.steps, losses


def module_seconds(name: str, args: argparse.Namespace) -> tuple[float, list[float]]:
    """The same under the Trainer."""
    part, losses = build(name, args.size == "toy"), Losses()
    phase, steps = part.phase, args.steps + 2
    whole = Phase(
        steps, phase.mode, phase.side, phase.micro_batch_size, phase.micro_batch_size, phase.size_step
    )
    callbacks = [ResolutionCurriculum([whole]), ExactResume(), Throughput(), PhaseProgressBar(), losses]
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):  # the progress bar
        loggers = [TensorBoardLogger(folder, "", ""), MetricsLogger(folder, "metrics")]
        timing = train(
            part.module,
            part.batches(phase.micro_batch_size, steps),
            warmup=2,
            steps=args.steps,
            callbacks=callbacks,
            accelerator="cpu",
            precision="bf16-mixed",
            logger=loggers,
            log_every_n_steps=20,
            deterministic=True,
            enable_progress_bar=True,
            default_root_dir=folder,
        )
    return timing.seconds, torch.stack(losses.found).tolist()


def compare(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Both in turns."""
    runs: dict[str, Callable[..., tuple[float, list[float]]]] = {
        "bare": bare_seconds,
        "module": module_seconds,
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in runs}
    losses: dict[str, list[float]] = {}
    for number in range(args.rounds):
        order = list(runs) if number % 2 == 0 else list(reversed(runs))
        for kind in order:
            taken, losses[kind] = runs[kind](name, args)
            seconds[kind].append(taken)
    # Of the first steps: from random weights a difference in rounding grows tenfold with each.
    pairs = list(zip(losses["bare"], losses["module"], strict=True))[:ALIKE]
    worst = max(abs(a - b) / abs(a) for a, b in pairs)
    if worst > 1e-2:
        sys.exit(f"{name}: losses of the bare loop and of the module differ by {worst:.1%}: {losses}")
    pairs = [module / bare for bare, module in zip(seconds["bare"], seconds["module"], strict=True)]
    return {
        "seconds": {kind: [round(value, 5) for value in found] for kind, found in seconds.items()},
        "ratio": round(min(seconds["module"]) / min(seconds["bare"]), 4),
        "median_ratio_of_rounds": round(statistics.median(pairs), 4),
        "largest_difference_of_losses": worst,
    }


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="that are timed in a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", choices=["full", "toy"], default="full")
    args = parser.parse_args()
    if min(args.rounds, args.steps, args.threads) < 1:
        parser.error("--rounds, --steps and --threads: give at least 1")
    started_on = record.hardware()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)  # as the YAML have it, also in the bare loop
    keep_freed_memory()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    results = {name: compare(name, args) for name in args.parts}
    rows = [["", "bare s/step", "module s/step", "ratio", f"target {TARGET}"]]
    for name, found in results.items():
        fastest = [f"{min(found['seconds'][kind]):.4f}" for kind in ("bare", "module")]
        rows.append(
            [name, *fastest, f"{found['ratio']:.3f}", "met" if found["ratio"] <= TARGET else "missed"]
        )
    print(record.table(rows))
    if args.size == "full":
        print(f"wrote {record.write('modules', {'settings': vars(args), **results}, started_on)}")


if __name__ == "__main__":
    main()
