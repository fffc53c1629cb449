"""Sampling with the diffusion decoder: time on the shapes config, memory at full size.

    python benchmarks/decoder.py [--repeats 10]

Times are of random weights, which take as long as trained ones: seconds a picture at 224 px for 4, 20 and 50 steps and
for batches of 1 and 8, and guidance as one batched forward against two forwards. Memory is counted on the meta
device, where nothing is computed: bytes of the tensors alive at once, for the SDXL UNet at 1024 px.
"""

import argparse
import sys
import time
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import record
from illume_lightning.host_memory import keep_freed_memory
from illume_lightning.nn.diffusion_decoder import DiffusionDecoder, build_unet, sampling_scheduler
from illume_lightning.nn.latents import SpaceToDepth

GIB = 2**30


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensor memory made inside that is alive, and the most there ever was.

    Args:
        before: tensors whose memory was there before; views of them count nothing.
    """

    def __init__(self, before: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)

        def freed() -> None:
            self._known.discard(key)
            self.now -= size

        weakref.finalize(storage, freed)


def flash_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> torch.Tensor:
    """What scaled_dot_product_attention is on a GPU; on the meta device it would hold the whole matrix."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


def meta_memory(dtype: torch.dtype, batch: int, side: int, training: bool) -> float:
    """Peak GiB of activations and gradients of one forward, or one training step, of SDXL's UNet."""
    with torch.device("meta"):
        unet = build_unet()
        for tensor in (*unet.parameters(), *unet.buffers()):
            tensor.data = tensor.data.to(dtype)
        x = torch.empty(batch, 68, side // 8, side // 8, dtype=dtype)
        arguments = {
            "encoder_hidden_states": torch.empty(batch, 1, 2048, dtype=dtype),
            "added_cond_kwargs": {
                "text_embeds": torch.empty(batch, 1280, dtype=dtype),
                "time_ids": torch.empty(batch, 6, dtype=dtype),
            },
        }
        timesteps = torch.zeros(batch, dtype=torch.long)
        attention = mock.patch("torch.nn.functional.scaled_dot_product_attention", flash_attention)
        with attention, LiveBytes([*unet.parameters(), x]) as live, torch.set_grad_enabled(training):
            output = unet(x, timesteps, **arguments).sample
            if training:
                output.sum().backward()
    return live.peak / GIB


def small_decoder() -> DiffusionDecoder:
    """As in experiments/shapes/diffusion_decoder.yaml."""
    torch.manual_seed(0)
    unet = build_unet(192, 16, (96, 128, 192), (0, 0, 1), 32, 32, 32, 32, 8, 1)
    scheduler = DDPMScheduler(prediction_type="sample", clip_sample=False)
    return DiffusionDecoder(unet, SpaceToDepth(8), scheduler, sizes=[(224, 224)]).eval()


def best(run: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest of several runs, after one to warm up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return float(np.min(times))


def seconds_per_picture(decoder: DiffusionDecoder) -> dict[str, float]:
    """Of sampling, by steps, batch and guidance."""
    scheduler = sampling_scheduler("diffusers.DDIMScheduler", decoder.scheduler)
    seconds = {}
    for steps in (4, 20, 50):
        for batch in (1, 8):
            features = torch.randn(batch, 16, 7, 7)
            for guidance in (1.0, 2.0):
                taken = best(lambda f=features, s=steps, g=guidance: decoder.sample(f, scheduler, s, g), 2)
                seconds[f"{steps} steps, batch {batch}, guidance {guidance:.0f}"] = taken / batch
    return seconds


def two_forwards_over_one(decoder: DiffusionDecoder, repeats: int) -> dict[str, float]:
    """Guidance by two forwards against one batched forward, as a ratio of times, by batch."""
    ratios = {}
    for batch in (1, 8):
        noisy, features = torch.randn(batch, 192, 28, 28), torch.randn(batch, 16, 7, 7)
        time_zero = torch.zeros(2 * batch)

        def once(
            noisy: torch.Tensor = noisy, f: torch.Tensor = features, t: torch.Tensor = time_zero
        ) -> None:
            decoder.predict(torch.cat([noisy, noisy]), t, torch.cat([torch.zeros_like(f), f]))

        def twice(
            noisy: torch.Tensor = noisy, f: torch.Tensor = features, t: torch.Tensor = time_zero
        ) -> None:
            for given in (torch.zeros_like(f), f):
                decoder.predict(noisy, t[: len(noisy)], given)

        ratios[f"batch {batch}"] = round(best(twice, repeats) / best(once, repeats), 3)
    return ratios


def full_size_memory() -> dict[str, float]:
    """GiB of the SDXL UNet, by what holds it."""
    parameters, half = 2_567_648_004, torch.bfloat16
    return {
        "weights bf16": parameters * 2 / GIB,
        "weights, gradients, AdamW and EMA fp32": parameters * 20 / GIB,
        "sampling 1024 px, batch 1, bf16, activations": meta_memory(half, 1, 1024, False),
        "sampling 1024 px, batch 1, guided, bf16, activations": meta_memory(half, 2, 1024, False),
        "training 1024 px, a picture, bf16, activations and gradients": meta_memory(half, 1, 1024, True),
        "training 512 px, a picture, bf16, activations and gradients": meta_memory(half, 1, 512, True),
    }


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    started_on = record.hardware()
    keep_freed_memory()
    decoder = small_decoder()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        seconds = seconds_per_picture(decoder)
        ratios = two_forwards_over_one(decoder, args.repeats)
    memory = full_size_memory()
    print(
        record.table(
            [["sampling, 224 px, bf16", "s/picture"], *([n, f"{s:.3f}"] for n, s in seconds.items())]
        )
    )
    print(f"two forwards take {ratios} times as long as one batched forward")
    print(record.table([["SDXL UNet", "GiB"], *([name, f"{value:.2f}"] for name, value in memory.items())]))
    results = {"seconds_per_picture": seconds, "two_forwards_over_one": ratios, "gib": memory}
    print(record.write("decoder", results, started_on))


if __name__ == "__main__":
    main()
