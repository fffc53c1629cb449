"""Recorded generations of the official MLLM, and the same quantities computed here.

``NAME_generation.json`` and ``NAME_generation.safetensors`` beside the files of ``mllm_parity``: what may come next at
every step of a script, scores after temperature, top-k and top-p, and greedy pictures with guidance.

The official release guides log-probabilities, here it is logits, which is the same up to a constant of each row: so
processed scores are compared as log-probabilities over what may come.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from illume_lightning.grammar import Grammar
from illume_lightning.image_layout import ImageLayout, image_layout
from illume_lightning.nn.generation import Engine, Prompt, Request
from illume_lightning.nn.mllm import MLLM
from illume_lightning.nn.mllm_parity import IMAGE_ID, Compared, picture
from illume_lightning.nn.token_sampling import SegmentSampling, TokenSampling, guide, restrict
from illume_lightning.resolution import Grids, Size
from illume_lightning.vocabulary import Vocabulary

GREEDY = SegmentSampling(temperature=0.0)


class _Case(NamedTuple):
    """One recorded generation, and its two prompts."""

    name: str
    recorded: Mapping[str, Any]
    prompt: Prompt
    unconditional: Prompt


@torch.no_grad()
def compared_generations(mllm: MLLM, directory: Path, name: str, device: torch.device) -> Iterator[Compared]:
    """Everything that the generation fixture of a model records, if there is one; computed here in fp32.

    Raises:
        ValueError: a prompt holds a picture that no batch fixture has.
    """
    path = directory / f"{name}_generation.json"
    if not path.is_file():
        return
    recorded = json.loads(path.read_text())
    trace = recorded["trace"]["scripted_mask_trace"]
    semantic, pixel = (trace["rows_cols"][level] for level in ("level0", "level1"))
    layout = ImageLayout(Grids((semantic[0], semantic[1]), (pixel[0], pixel[1])), mllm.vocabulary)
    grammar = Grammar(mllm.vocabulary, layout, release=True)
    yield _allowed(path, "scripted_mask_trace", grammar, trace["script"], trace["steps"])
    yield from _sampling(path, recorded["trace"]["apply_sampling"], device)
    cases = []
    for case, generation in recorded["generation"].items():
        prompts = (
            _prompt(generation[kind][0], mllm.vocabulary, path, device) for kind in ("prompt", "uncond")
        )
        cases.append(_Case(case, generation, *prompts))
    yield from _outputs(mllm, layout, path, cases)
    for case in cases:
        ids, steps = case.recorded["output_ids"], case.recorded["steps"]
        yield _allowed(path, f"{case.name}.allowed", Grammar(mllm.vocabulary, layout), ids[:-1], steps)
        yield from _scores(mllm, path.with_suffix(".safetensors"), case, device)


def _allowed(
    path: Path, quantity: str, grammar: Grammar, script: Sequence[int], steps: Sequence[Mapping[str, Any]]
) -> Compared:
    """What may come next before, within and after a script of ids, (steps, ids)."""
    found = [grammar.allowed]
    for id in script:
        grammar.advance(id)
        found.append(grammar.allowed)
    size = grammar.vocabulary.size
    ours = [_mask(((ids.start, ids.stop) for ids in allowed), size) for allowed in found]
    recorded = [_mask(step["allowed"], size) for step in steps]
    return Compared(path, quantity, torch.stack(ours), torch.stack(recorded))


def _mask(ranges: Iterable[Sequence[int]], size: int) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    for start, stop in ranges:
        mask[start:stop] = True
    return mask


def _sampling(path: Path, recorded: Mapping[str, Any], device: torch.device) -> Iterator[Compared]:
    """Scores of what is drawn from at several settings; recorded ones are null elsewhere."""
    scores = torch.tensor(recorded["scores"], device=device)
    for case in recorded["cases"]:
        sampling = SegmentSampling(case["temp"], case["top_k"], case["top_p"])
        rows = [[-torch.inf if score is None else score for score in row] for row in case["out"]]
        quantity = f"apply_sampling {case['temp']:g} {case['top_k']} {case['top_p']:g}"
        yield from _compared_scores(path, quantity, restrict(scores, sampling), torch.tensor(rows))


def _outputs(mllm: MLLM, layout: ImageLayout, path: Path, cases: Sequence[_Case]) -> Iterator[Compared]:
    """Greedy pictures, all in one batch of the engine."""
    requests = [
        Request(
            case.prompt,
            layout=layout,
            unconditional=case.unconditional,
            sampling=TokenSampling(GREEDY, GREEDY, GREEDY, case.recorded["guidance"]),
        )
        for case in cases
    ]
    longest = max(max(len(case.prompt.ids), len(case.unconditional.ids)) for case in cases)
    engine = Engine(mllm, (), slots=2 * len(cases), context=longest + layout.length)
    outputs: list[list[int]] = [[] for _ in cases]
    for update in engine.run(requests):
        outputs[update.number].extend(update.ids)
    for case, ids in zip(cases, outputs, strict=True):
        expected = torch.tensor(case.recorded["output_ids"])
        yield Compared(path, f"{case.name}.output_ids", torch.tensor(ids), expected)


def _scores(mllm: MLLM, path: Path, case: _Case, device: torch.device) -> Iterator[Compared]:
    """Logits of every recorded token by one pass without a cache, and what guidance makes of them."""
    recorded, tensors = case.recorded, load_file(path)
    conditional, unconditional = (
        _logits(mllm, prompt, recorded["output_ids"], device) for prompt in (case.prompt, case.unconditional)
    )
    quantity = f"{case.name}.raw_cond_logits"
    # Where the recording forced the start of the picture, it has no logits but 0 and -inf.
    known = tensors[quantity].isfinite().all(-1)
    yield Compared(path, quantity, conditional[known.to(device)], tensors[quantity][known])
    allowed = torch.stack([_mask(step["allowed"], mllm.vocabulary.size) for step in recorded["steps"]])
    guided = guide(conditional, unconditional, recorded["guidance"])
    guided = guided.masked_fill(~allowed.to(device), -torch.inf)
    quantity = f"{case.name}.processed_scores"
    ours, expected = guided.log_softmax(-1), tensors[quantity].log_softmax(-1)
    yield from _compared_scores(path, quantity, ours, expected)


def _logits(mllm: MLLM, prompt: Prompt, output: Sequence[int], device: torch.device) -> Tensor:
    """Logits from which every token of an answer is drawn, (tokens, ids)."""
    ids = torch.tensor([[*prompt.ids, *output[:-1]]], device=device)
    semantic_slots, pixel_slots = (
        torch.tensor(slots, dtype=torch.long, device=device)
        for slots in (prompt.semantic_slots, prompt.pixel_slots)
    )
    embeds = mllm.embed(ids, prompt.images, semantic_slots, pixel_slots)
    hidden = mllm.hidden(embeds, torch.arange(ids.shape[1], device=device)[None])
    return mllm.head.logits(hidden[0, len(prompt.ids) - 1 :])


def _compared_scores(path: Path, quantity: str, ours: Tensor, recorded: Tensor) -> Iterator[Compared]:
    """Scores, and apart from them which are finite."""
    finite = recorded.isfinite()
    yield Compared(path, f"{quantity}: finite", ours.isfinite(), finite)
    yield Compared(path, quantity, ours[finite.to(ours.device)], recorded[finite])


def _prompt(recorded: Sequence[int], vocabulary: Vocabulary, path: Path, device: torch.device) -> Prompt:
    """A prompt with the picture's layout where the official ids have their sign for a picture."""
    ids: list[int] = []
    images: list[Tensor] = []
    semantic: list[int] = []
    pixel: list[int] = []
    for id in recorded:
        if id != IMAGE_ID:
            ids.append(id)
            continue
        image = _picture(path, _size(recorded, vocabulary), device)
        layout = image_layout((image.shape[-2], image.shape[-1]), vocabulary)
        images.append(image)
        semantic.extend(len(ids) + slot for slot in layout.semantic_slots)
        pixel.extend(len(ids) + slot for slot in layout.pixel_slots)
        ids.extend(layout.template)
    return Prompt(ids, [0] * len(ids), images, semantic, pixel)


def _size(ids: Sequence[int], vocabulary: Vocabulary) -> Size:
    """Height and width that the first size tokens name; 0 where there are none."""
    height, width = (
        next((kind.index(id) + 1 for id in ids if id in kind), 0)
        for kind in (vocabulary.height_ids, vocabulary.width_ids)
    )
    return height * vocabulary.size_step, width * vocabulary.size_step


def _picture(path: Path, size: Size, device: torch.device) -> Tensor:
    """The batch fixtures' picture of a size."""
    name = path.name.split("_generation.")[0]
    for batch in sorted(path.parent.glob(f"{name}_batch*.safetensors")):
        recorded = load_file(batch)
        for sample in range(len(recorded["input_ids"])):
            if f"image{sample}_u8" in recorded and recorded[f"image{sample}_u8"].shape[-2:] == size:
                return picture(recorded, sample, device)
    raise ValueError(
        f"{path.name}: a prompt holds a picture of {size[0]} x {size[1]} (height x width), and no {name}_batch*."
        "safetensors beside it has one."
    )
