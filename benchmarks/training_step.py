"""DualViTok's training step: ours against a plain implementation of the same model (straightforward.py).

    python benchmarks/training_step.py [--size 256] [--batch 1] [--threads 2] [--profile]

"Ours" keeps freed memory, as `illume fit` does on a CPU; the last two modes tell that gain from the model's.
A step is forward, losses (without LPIPS and GAN) and backward; the optimizer's, the same for all, is left
out. Each mode runs in its own process with the same weights. Reconstruction, loss and gradients of the fp32
modes must agree, or the benchmark fails.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import record, straightforward
from illume_lightning.host_memory import keep_freed_memory
from illume_lightning.nn.dualvitok import DualViTok
from illume_lightning.nn.losses import DualViTokLoss
from illume_lightning.nn.pixel import PixelDecoder, PixelEncoder
from illume_lightning.nn.semantic import QwenVisionTower, SemanticDecoder, SemanticEncoder
from illume_lightning.nn.simvq import SimVQ

MODES = (
    "straightforward fp32",
    "ours fp32",
    "ours bf16",
    "straightforward bf16",
    "straightforward fp32, memory kept",
    "ours fp32, memory not kept",
)
COMPARED = (
    "pixel_encoder.conv_in.weight",
    "pixel_encoder.down.0.block.0.norm1.weight",
    "pixel_quantizer.code_transform.weight",
    "pixel_decoder.mid.block_1.norm1.conv_y.weight",
    "pixel_decoder.up.0.block.2.norm2.conv_b.weight",
    "pixel_decoder.up.1.upsample.conv.bias",
    "pixel_decoder.norm_out.norm_layer.weight",
    "semantic_encoder.proj_in.weight",
    "semantic_decoder.proj_out.0.weight",
)


def build(args: argparse.Namespace) -> DualViTok:
    """The model at the benchmark's sizes, seeded."""
    torch.manual_seed(0)
    blocks, width, heads = args.num_blocks, args.width, args.width // 80
    return DualViTok(
        semantic_encoder=SemanticEncoder(
            QwenVisionTower(args.depth, width, heads, args.features), blocks, width, heads
        ),
        semantic_quantizer=SimVQ(32768, 32),
        semantic_decoder=SemanticDecoder(32, blocks, width, heads, args.features),
        pixel_encoder=PixelEncoder(args.encoder_channels),
        pixel_quantizer=SimVQ(98304, 32),
        pixel_decoder=PixelDecoder(args.decoder_channels),
    )


def build_straightforward(args: argparse.Namespace) -> nn.Module:
    """The plain model, sharing the weights that ``build`` makes."""
    ours = build(args)
    sizes = {
        "num_blocks": args.num_blocks,
        "width": args.width,
        "num_heads": args.width // 80,
        "semantic_codes": 32768,
        "pixel_codes": 98304,
        "encoder_channels": args.encoder_channels,
        "decoder_channels": args.decoder_channels,
    }
    assert ours.semantic_encoder is not None
    with torch.device("meta"):
        plain = straightforward.DualViTok(sizes, ours.semantic_encoder.model)
    plain.load_state_dict(ours.state_dict(), assign=True)
    return plain


def forward_of(
    mode: str, args: argparse.Namespace
) -> tuple[nn.Module, Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """The mode's model, and its forward pass from images to reconstruction and loss."""
    if mode.startswith("straightforward"):
        model = build_straightforward(args)
        return model, model
    model = build(args)
    loss = DualViTokLoss(perceptual_weight=0, adversarial_weight=0)

    def forward(images: Tensor) -> tuple[Tensor, Tensor]:
        output = model(images)
        return output.reconstruction, loss.generator(images, output)["loss"]

    return model, forward


def measure(mode: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one mode in this process."""
    torch.set_num_threads(args.threads)
    if mode.endswith("memory kept") or mode in ("ours fp32", "ours bf16"):
        keep_freed_memory()
    model, forward = forward_of(mode, args)
    model.train()
    images = (
        torch.rand(args.batch, 3, args.size, args.size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    )

    def step() -> tuple[Tensor, Tensor]:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in mode):
            reconstruction, loss = forward(images)
        loss.backward()
        return reconstruction.detach(), loss.detach()

    weights = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    reconstruction, loss = step()
    times = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    parameters = dict(model.named_parameters())
    gradients = {name: parameters[name].grad for name in COMPARED}
    torch.save({"reconstruction": reconstruction, "loss": loss} | gradients, args.outputs)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    result = {"seconds": times, "peak_gib": peak, "before_gib": weights}
    if args.profile:
        result["operators"] = profile(step)
    return result


def profile(step: Callable[[], Any]) -> list[dict[str, Any]]:
    """The ten operators with the most time of their own in one step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    return [
        {"name": event.key, "calls": event.count, "seconds": round(event.self_cpu_time_total / 1e6, 3)}
        for event in events[:10]
    ]


def disagreement(a: Path, b: Path) -> dict[str, float]:
    """Largest difference of each compared tensor, relative to its largest value."""
    left, right = (torch.load(path, weights_only=True) for path in (a, b))
    return {
        name: float((left[name] - right[name]).abs().max() / right[name].abs().max().clamp_min(1e-12))
        for name in left
    }


def main() -> None:
    """Run all modes and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="height and width of the pictures")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--encoder-channels", type=int, default=128)
    parser.add_argument("--decoder-channels", type=int, default=384)
    parser.add_argument("--depth", type=int, default=2, help="blocks of the vision tower")
    parser.add_argument("--num-blocks", type=int, default=1, help="semantic blocks on either side")
    parser.add_argument("--width", type=int, default=1280, help="of tower and semantic blocks")
    parser.add_argument("--features", type=int, default=3584, help="of the tower's merger")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="add the costliest operators of each mode")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--mode", choices=MODES, help="run this one here and print JSON")
    parser.add_argument("--outputs", type=Path, help="where a single mode leaves its results")
    args = parser.parse_args()
    if args.mode:
        print(json.dumps(measure(args.mode, args)))
        return
    started_on = record.hardware()
    with tempfile.TemporaryDirectory() as folder:
        paths = {
            mode: Path(folder) / f"{mode.replace(', ', '_').replace(' ', '_')}.pt" for mode in args.modes
        }
        runs = {mode: run(mode, paths[mode]) for mode in args.modes}
        reference = paths.get(MODES[0])
        errors = {m: disagreement(p, reference) for m, p in paths.items() if reference and p != reference}
    report(args, runs, errors, started_on)


def run(mode: str, outputs: Path) -> dict[str, Any]:
    """One mode in a process of its own."""
    command = [sys.executable, *sys.argv, "--mode", mode, "--outputs", str(outputs)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout)


def report(
    args: argparse.Namespace,
    runs: dict[str, Any],
    errors: dict[str, dict[str, float]],
    started_on: dict[str, Any],
) -> None:
    """Print and write the comparison; fail where fp32 results disagree."""
    best = {mode: min(run["seconds"]) for mode, run in runs.items()}
    baseline = best.get(MODES[0])
    rows = [["", "s/step", "speed-up", "peak GiB", "largest difference"]]
    for mode, result in runs.items():
        speedup = f"{baseline / best[mode]:.2f}x" if baseline else ""
        error = f"{max(errors[mode].values()):.1e}" if mode in errors else ""
        rows.append([mode, f"{best[mode]:.2f}", speedup, f"{result['peak_gib']:.2f}", error])
    print(record.table(rows))
    for mode, result in runs.items():
        for operator in result.get("operators", []):
            print(f"{mode:34}{operator['seconds']:8.3f} s {operator['calls']:6} x {operator['name']}")
    settings = {k: v for k, v in vars(args).items() if k not in ("mode", "modes", "outputs", "profile")}
    results = {"settings": settings, "modes": runs, "relative_difference": errors}
    if baseline:
        results["speedup"] = {mode: round(baseline / seconds, 3) for mode, seconds in best.items()}
    print(f"wrote {record.write('training_step', results, started_on)}")
    fp32 = [difference for mode, difference in errors.items() if "fp32" in mode]
    wrong = {name: value for difference in fp32 for name, value in difference.items() if value > 1e-3}
    if wrong:
        sys.exit(f"fp32 results disagree: {wrong}")


if __name__ == "__main__":
    main()
