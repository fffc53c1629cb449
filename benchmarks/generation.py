"""Writing one 256 x 256 picture: the engine against ``generate`` of Hugging Face, from the same weights.

    python benchmarks/generation.py [--dtype float32 bfloat16] [--device cpu] [--threads 2] [--tokens 0] [--repeats 2]

A trunk of about 100 M parameters, the whole vocabulary of 283 k ids, random weights, guidance 2, top-k 2048 and 6144,
temperature 1. Plain is what one writes with Qwen2ForCausalLM: one table for embedding and head, ``generate`` with a
logits processor that runs the sequence without condition with a cache of its own, guides, masks and cuts; every
token is a step of its own, the markers too. With greedy choice both must write the same ids in float32, or the
benchmark fails.

The read limit is the time in which a step's weights and cache are read once, at the fastest that this machine reads
a tensor of 1 GiB: for the engine the trunk, the head's rows of the segment and both caches; plain reads trunk and
whole head twice. With --tokens N, plain is timed on its first N tokens of each segment, and its time for the rest is
extrapolated; with --small, nothing is written.
"""

import argparse
import gc
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.generation import BaseStreamer

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import record
from illume_lightning.image_layout import ImageLayout, image_layout
from illume_lightning.nn.generation import Engine, Prompt, Request
from illume_lightning.nn.key_value_cache import KeyValueCache
from illume_lightning.nn.mllm import MLLM, build_trunk
from illume_lightning.nn.pixel import PixelEncoder
from illume_lightning.nn.semantic import QwenVisionTower
from illume_lightning.nn.token_sampling import SegmentSampling, TokenSampling
from illume_lightning.vocabulary import Vocabulary

TRUNK = {"width": 768, "depth": 12, "num_heads": 12, "num_kv_heads": 4, "mlp_width": 2944}
SMALL_TRUNK = {"width": 64, "depth": 2, "num_heads": 4, "num_kv_heads": 2, "mlp_width": 128}
SMALL_VOCABULARY = Vocabulary(num_text=4000, semantic_codes=4096, pixel_codes=8192)
SIZE = (256, 256)
CONDITION_TOKENS, UNCONDITION_TOKENS = 48, 16
BATCH = 8
TARGET = 4.0
MIB = 2**20
SAMPLING = TokenSampling()
_GREEDY = SegmentSampling(temperature=0.0)
GREEDY = TokenSampling(semantic=_GREEDY, pixel=_GREEDY)


@dataclass(frozen=True)
class Case:
    """Both models with the same weights, and the picture that they write."""

    mllm: MLLM
    plain: Qwen2ForCausalLM
    layout: ImageLayout
    prompt: Prompt
    unconditional: Prompt

    @property
    def segments(self) -> dict[str, range]:
        """Positions of both segments, markers included."""
        start = self.layout.template.index(self.layout.vocabulary.start_of_pixel)
        return {"semantic": range(start), "pixel": range(start, self.layout.length)}

    @property
    def device(self) -> torch.device:
        """Of both models."""
        return self.plain.device


class Written(NamedTuple):
    """What a run wrote, and how long that took."""

    ids: list[list[int]]
    seconds: float
    step_seconds: dict[str, float]
    """Of one pass, by segment."""


def build(device: str, dtype: torch.dtype, small: bool) -> Case:
    """Random weights, equal in every dtype before rounding."""
    torch.manual_seed(0)
    vocabulary = SMALL_VOCABULARY if small else Vocabulary()
    tower = QwenVisionTower(depth=1, width=64, num_heads=2, out_features=64)
    pixel = PixelEncoder(
        16, [1, 1, 1, 1, 1], num_res_blocks=1, attention_levels=[], latent_channels=8, norm_groups=4
    )
    sizes = SMALL_TRUNK if small else TRUNK
    # Large enough that every choice hangs on what stands before; at the usual 0.02 one code repeats.
    trunk = build_trunk(**sizes, init_std=1.5 * sizes["width"] ** -0.5)
    mllm = MLLM(trunk, vocabulary, tower, pixel, tied=True)
    mllm = mllm.to(device).requires_grad_(False).eval()
    for parameter in mllm.parameters():
        # Not the buffers: rotary frequencies stay in float32, as Hugging Face loads them.
        parameter.data = parameter.data.to(dtype)
    layout = image_layout(SIZE, vocabulary)
    prompts = []
    for count in (CONDITION_TOKENS, UNCONDITION_TOKENS):
        ids = [*torch.randint(vocabulary.num_text, (count,)).tolist(), *layout.size_tokens]
        prompts.append(Prompt(ids, [0] * len(ids)))
    return Case(mllm, plain_model(mllm), layout, *prompts)


def plain_model(mllm: MLLM) -> Qwen2ForCausalLM:
    """The same weights as Hugging Face holds them: one table of all ids. The trunk's memory is shared."""
    settings = mllm.trunk.config.to_dict() | {"vocab_size": mllm.vocabulary.size, "tie_word_embeddings": True}
    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(**settings | {"use_cache": True}))
    table = torch.cat(mllm.embedding.tables)
    trunk = {f"model.{name}": weights for name, weights in mllm.trunk.state_dict().items()}
    tables = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), table)
    model.load_state_dict(trunk | tables, assign=True)
    model.tie_weights()
    # Its frequencies are no part of the state.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(table.device)
    model.set_attn_implementation("sdpa")
    return model.requires_grad_(False).eval()


class GuidedGrammar(LogitsProcessor):
    """Guidance, grammar, temperature and top-k of one picture, as a processor of ``generate``.

    Args:
        case: models and picture.
        sampling: settings.
    """

    def __init__(self, case: Case, sampling: TokenSampling) -> None:
        self.case, self.sampling = case, sampling
        self.cache = DynamicCache(config=case.plain.config)
        self.unconditional = torch.tensor([case.unconditional.ids], device=case.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(1, L) ids so far and (1, K) logits -> (1, K) scores."""
        picture = input_ids[:, len(self.case.prompt.ids) :]
        is_first = self.cache.get_seq_length() == 0
        fed = torch.cat([self.unconditional, picture], dim=1) if is_first else picture[:, -1:]
        output = self.case.plain(input_ids=fed, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        conditional, unconditional = scores.log_softmax(-1), output.logits[:, -1].float().log_softmax(-1)
        guided = unconditional + self.sampling.guidance * (conditional - unconditional)
        allowed = self.case.layout.allowed[picture.shape[1]]
        scores = torch.full_like(guided, -torch.inf)
        scores[:, allowed.start : allowed.stop] = guided[:, allowed.start : allowed.stop]
        is_semantic = allowed == self.case.layout.vocabulary.semantic_ids
        return self._restrict(scores, self.sampling.semantic if is_semantic else self.sampling.pixel)

    @staticmethod
    def _restrict(scores: Tensor, sampling: SegmentSampling) -> Tensor:
        if sampling.temperature == 0:
            return scores
        scores = scores / sampling.temperature
        last = scores.topk(sampling.top_k, dim=-1).values[:, -1:]
        return scores.masked_fill(scores < last, -torch.inf)


class Clock(BaseStreamer):
    """When every token was there; they come to the host one by one."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """First the prompt, then every new token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing follows."""


@torch.no_grad()
def write_plain(
    case: Case, sampling: TokenSampling, count: int, prefix: Sequence[int] = ()
) -> tuple[list[int], list[float]]:
    """The first ``count`` ids after a prefix of the picture, and the seconds of each.

    The first one's are those of reading prompt and prefix too.
    """
    # Without it Hugging Face draws from the 50 most likely.
    drawing = {"do_sample": False} if sampling is GREEDY else {"do_sample": True, "top_k": 0}
    settings = GenerationConfig(max_new_tokens=count, use_cache=True, **drawing)
    clock = Clock()
    ids = torch.tensor([[*case.prompt.ids, *prefix]], device=case.device)
    written = case.plain.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=settings,
        logits_processor=LogitsProcessorList([GuidedGrammar(case, sampling)]),
        streamer=clock,
    )
    seconds = [later - before for before, later in pairwise(clock.times)]
    return written[0, ids.shape[1] :].tolist(), seconds


def time_plain(case: Case, tokens: int, picture: list[int]) -> Written:
    """A whole picture, or the first tokens of each segment of one; a segment's first token is not its usual one."""
    spans = case.segments
    if not tokens:
        ids, seconds = write_plain(case, SAMPLING, case.layout.length)
        steps = {name: statistics.median(seconds[span.start + 1 : span.stop]) for name, span in spans.items()}
        return Written([ids], sum(seconds), steps)
    total, steps = 0.0, {}
    for name, span in spans.items():
        _, seconds = write_plain(case, SAMPLING, min(tokens, len(span)), picture[: span.start])
        rest = statistics.mean(seconds[1:])
        total += rest * len(span) + (seconds[0] - rest if span.start == 0 else 0)
        steps[name] = statistics.median(seconds[1:])
    return Written([], total, steps)


def write_engine(case: Case, sampling: TokenSampling, batch: int) -> Written:
    """So many pictures side by side, of one seed each."""
    start = time.perf_counter()
    engine = Engine(case.mllm, [], 2 * batch, context(case))
    requests = [
        Request(
            case.prompt, layout=case.layout, unconditional=case.unconditional, sampling=sampling, seed=seed
        )
        for seed in range(batch)
    ]
    ids: list[list[int]] = [[] for _ in requests]
    lines: list[tuple[int, float]] = []
    for update in engine.run(requests):
        ids[update.number] += update.ids
        if update.number == batch - 1:
            wait(case.device)
            lines.append((round(update.picture * case.layout.length), time.perf_counter()))
    return Written(ids, time.perf_counter() - start, step_seconds(case.layout, case.segments, lines))


def step_seconds(
    layout: ImageLayout, spans: dict[str, range], lines: list[tuple[int, float]]
) -> dict[str, float]:
    """Seconds of a pass, by segment: of the median row, whose end of line rides along with the next one's first."""
    seconds = {}
    for name, span in spans.items():
        columns = getattr(layout.grids, name)[1]
        rows = [
            (later - before) / columns
            for (first, before), (last, later) in pairwise(lines)
            if first in span and last in span and last - first == columns + 1
        ]
        seconds[name] = statistics.median(rows)
    return seconds


def context(case: Case) -> int:
    """Tokens of the longest sequence."""
    return len(case.prompt.ids) + case.layout.length


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def with_growth(run: Callable[[], Written], device: torch.device) -> tuple[Written, float]:
    """What a run wrote, and the largest growth of memory meanwhile in MiB: allocated on CUDA, else resident."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        written = run()
        return written, (torch.cuda.max_memory_allocated(device) - before) / MIB
    before, done = resident(), threading.Event()
    seen = [before]

    def watch() -> None:
        while not done.wait(0.02):
            seen.append(resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        written = run()
    finally:
        done.set()
        watcher.join()
    return written, (max(seen) - before) / MIB


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def read_bandwidth(device: str, small: bool) -> float:
    """Bytes per second at which a tensor of 1 GiB is read, the fastest of a sum and of products with a vector."""
    values = torch.ones(2**20 if small else 2**28, device=device).view(-1, 4096)
    vector = torch.ones(4096, device=device)
    seconds = []
    for read in (values.sum, lambda: values @ vector):
        for _ in range(6):
            wait(values.device)
            start = time.perf_counter()
            read()
            wait(values.device)
            seconds.append(time.perf_counter() - start)
    return values.nbytes / min(seconds)


def bytes_read(case: Case) -> dict[str, dict[str, int]]:
    """Bytes that a step for one guided picture has to read, by segment: trunk, rows of the head, cache.

    Plain reads trunk and head for each of its two sequences.
    """
    trunk = sum(parameter.nbytes for parameter in case.mllm.trunk.parameters())
    table, config = case.plain.lm_head.weight, case.mllm.trunk.config
    width = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    token = 2 * config.num_hidden_layers * width * table.itemsize
    prompts = len(case.prompt.ids) + len(case.unconditional.ids)
    needed = {}
    for name, span in case.segments.items():
        rows = len(getattr(case.layout.vocabulary, f"{name}_ids"))
        cached = round((prompts + 2 * statistics.mean(span)) * token)
        needed[name] = {
            "plain": 2 * (trunk + table.nbytes) + cached,
            "engine": trunk + rows * table.shape[1] * table.itemsize + cached,
        }
    return needed


def agreement(case: Case, tokens: int) -> tuple[dict[str, Any], list[int]]:
    """Greedy ids of the engine against plain's first ones of both segments; also warms both up."""
    picture = write_engine(case, GREEDY, 1).ids[0]
    same, compared = 0, 0
    for span in case.segments.values():
        count = min(tokens, len(span))
        ids, _ = write_plain(case, GREEDY, count, picture[: span.start])
        same += sum(a == b for a, b in zip(ids, picture[span.start :][:count], strict=True))
        compared += count
    return {"compared": compared, "same": same, "distinct_ids_of_picture": len(set(picture))}, picture


def measure(args: argparse.Namespace, dtype: str, bandwidth: float) -> dict[str, Any]:
    """All figures in one dtype."""
    case = build(args.device, getattr(torch, dtype), args.small)
    same, picture = agreement(case, args.agreement)
    if dtype == "float32" and same["same"] < same["compared"]:
        sys.exit(f"the engine and plain write different ids: {same['same']} of {same['compared']} agree")
    runs = {
        "plain": lambda: time_plain(case, args.tokens, picture),
        "engine": lambda: write_engine(case, SAMPLING, 1),
        f"engine, batch {BATCH}": lambda: write_engine(case, SAMPLING, BATCH),
    }
    written: dict[str, list[Written]] = {name: [] for name in runs}
    peaks: dict[str, list[float]] = {name: [] for name in runs}
    # In turns, so that a slow minute of the machine meets all of them.
    for _ in range(args.repeats):
        for name, run in runs.items():
            found, growth = with_growth(run, case.device)
            written[name].append(found)
            peaks[name].append(growth)
    caches = {
        name: KeyValueCache(case.mllm.trunk.config, 2 * batch, context(case)).num_bytes(getattr(torch, dtype))
        / MIB
        for name, batch in zip(list(runs)[1:], (1, BATCH), strict=True)
    }
    memory = {"growth": {name: round(max(values), 1) for name, values in peaks.items()}}
    memory["cache"] = {name: round(value, 1) for name, value in caches.items()}
    return {"agreement": same, **figures(case, written, bandwidth), "memory_mib": memory}


def figures(case: Case, written: dict[str, list[Written]], bandwidth: float) -> dict[str, Any]:
    """Times of the fastest repeats, their ratios, and shares of the read limit."""
    names = list(written)
    per_picture = {
        name: min(run.seconds for run in runs) / (BATCH if name == names[2] else 1)
        for name, runs in written.items()
    }
    steps = {
        segment: {name: min(run.step_seconds[segment] for run in runs) for name, runs in written.items()}
        for segment in case.segments
    }
    needed, cells = (
        bytes_read(case),
        {"semantic": case.layout.semantic_slots, "pixel": case.layout.pixel_slots},
    )
    of_plain = sum(needed[segment]["plain"] * len(span) for segment, span in case.segments.items())
    of_engine = sum(needed[segment]["engine"] * len(slots) for segment, slots in cells.items())
    plain, engine, batched = per_picture.values()
    return {
        "seconds_per_picture": {name: round(value, 3) for name, value in per_picture.items()},
        "tokens_per_s": {name: round(case.layout.length / value, 2) for name, value in per_picture.items()},
        "speed_up": round(plain / engine, 2),
        "speed_up_if_both_met_the_read_limit": round(of_plain / of_engine, 2),
        f"throughput_batch_{BATCH}_over_1": round(engine / batched, 2),
        "step_ms": {
            segment: {name: round(1e3 * value, 2) for name, value in found.items()}
            for segment, found in steps.items()
        },
        "step_reads_mib": {
            segment: {name: round(value / MIB, 1) for name, value in found.items()}
            for segment, found in needed.items()
        },
        "share_of_read_limit": {
            segment: {
                name: round(value / bandwidth / steps[segment][name], 3) for name, value in found.items()
            }
            for segment, found in needed.items()
        },
    }


def report(results: dict[str, Any], dtypes: Sequence[str]) -> None:
    """Print the figures."""
    rows = [["dtype", "", "s/picture", "tokens/s", "semantic ms", "pixel ms", "growth MiB", "cache MiB"]]
    for dtype in dtypes:
        found = results[dtype]
        for name, seconds in found["seconds_per_picture"].items():
            steps = (f"{found['step_ms'][segment][name]:.1f}" for segment in ("semantic", "pixel"))
            memory = found["memory_mib"]
            sizes = f"{memory['growth'][name]:.0f}", f"{memory['cache'].get(name, 0) or '':.5}"
            rows.append([dtype, name, f"{seconds:.2f}", f"{found['tokens_per_s'][name]:.1f}", *steps, *sizes])
    print(record.table(rows))
    for dtype in dtypes:
        found = results[dtype]
        print(
            f"{dtype}: {found['speed_up']}x plain (target {TARGET:g}x; "
            f"{found['speed_up_if_both_met_the_read_limit']}x if both met the read limit), batch {BATCH} "
            f"{found[f'throughput_batch_{BATCH}_over_1']}x batch 1\n  shares of the read limit "
            f"{found['share_of_read_limit']}\n  greedy ids {found['agreement']}"
        )


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"]
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=0, help="time plain on so many of each segment; 0: all")
    parser.add_argument("--agreement", type=int, default=60, help="tokens of each segment to compare")
    parser.add_argument("--repeats", type=int, default=2, help="the fastest counts")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the benchmark; no record")
    args = parser.parse_args()
    if args.tokens == 1:
        parser.error("--tokens 1: a segment's first token is not timed; give at least 2")
    started_on = record.hardware()
    torch.set_num_threads(args.threads)
    bandwidth = read_bandwidth(args.device, args.small)
    with torch.device("meta"):
        trunk = build_trunk(**(SMALL_TRUNK if args.small else TRUNK))
    results = {
        "settings": vars(args),
        "trunk_parameters": sum(parameter.numel() for parameter in trunk.parameters()),
        "plain_timed_on": f"the first {args.tokens} tokens of each segment"
        if args.tokens
        else "whole pictures",
        "read_gb_per_s": round(bandwidth / 1e9, 2),
        **{dtype: measure(args, dtype, bandwidth) for dtype in args.dtype},
    }
    report(results, args.dtype)
    if not args.small:
        print(f"wrote {record.write('generation', results, started_on)}")


if __name__ == "__main__":
    main()
