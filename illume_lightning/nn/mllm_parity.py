"""Recorded tensors of the official MLLM, and the same quantities computed here.

``NAME_weights.safetensors``, ``NAME_config.json`` and ``NAME_batch*.safetensors`` with its ``_grads.json``; the
vision tower has the weights of the tokenizer fixture whose name has ``dualvitok`` for ``mllm``.

The official batch is padded on the left and counts positions through the padding. Here it is packed into one row:
RoPE sees only differences of positions, so both give the same numbers.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from illume_lightning.image_layout import image_layout
from illume_lightning.nn.checkpoints import build_official
from illume_lightning.nn.mllm import MLLM, build_trunk
from illume_lightning.nn.mllm_checkpoints import load_mllm, published_layout
from illume_lightning.vocabulary import Vocabulary

IMAGE_ID = -200
IGNORED = -100


class Compared(NamedTuple):
    """One quantity of a fixture file, here and as recorded: numbers, or ids and masks, which agree exactly."""

    path: Path
    quantity: str
    ours: Tensor
    recorded: Tensor


def recorded_mllms(directory: Path, device: torch.device) -> Iterator[tuple[str, MLLM]]:
    """NAME and model of every MLLM fixture of a folder, in fp32."""
    for weights in sorted(directory.glob("*_weights.safetensors")):
        name = weights.name.removesuffix("_weights.safetensors")
        config = json.loads((directory / f"{name}_config.json").read_text())
        if "mm_hidden_size" not in config.get("config", {}):
            continue
        mllm = _build(config, directory, name.replace("mllm", "dualvitok"))
        load_mllm(mllm, weights)
        yield name, mllm.to(device)


def compared_batches(mllm: MLLM, directory: Path, name: str, device: torch.device) -> Iterator[Compared]:
    """Everything that the batch fixtures of a model record, computed here in fp32."""
    for path in sorted(directory.glob(f"{name}_batch*.safetensors")):
        yield from _batch(mllm, path, device)


def _build(config: Mapping[str, Any], directory: Path, tokenizer_name: str) -> MLLM:
    """The recorded sizes, with frozen towers that have the tokenizer's weights."""
    tokenizer_config = json.loads((directory / f"{tokenizer_name}_config.json").read_text())
    tokenizer = build_official(tokenizer_config["vq_model"]["config"], tokenizer_config["qwen2vit_config"])
    tokenizer.load_state_dict(load_file(directory / f"{tokenizer_name}_weights.safetensors"))
    assert tokenizer.semantic_encoder is not None and tokenizer.pixel_encoder is not None
    sizes, ids = config["config"], config["ids"]
    trunk = build_trunk(
        width=sizes["hidden_size"],
        depth=sizes["num_hidden_layers"],
        num_heads=sizes["num_attention_heads"],
        num_kv_heads=sizes["num_key_value_heads"],
        mlp_width=sizes["intermediate_size"],
        rope_base=sizes["rope_theta"],
        max_positions=sizes["max_position_embeddings"],
        norm_eps=sizes["rms_norm_eps"],
    )
    vocabulary = Vocabulary(
        num_text=ids["special_tokens_ids"][0],
        semantic_codes=ids["level0"][1] - ids["level0"][0],
        pixel_codes=ids["level1"][1] - ids["level1"][0],
        num_sizes=ids["width_64_is"] - ids["height_64_is"],
        num_unused=ids["unused_tail"],
    )
    towers = tokenizer.semantic_encoder.model, tokenizer.pixel_encoder.requires_grad_(False)
    return MLLM(trunk, vocabulary, *towers, tied=sizes["tie_word_embeddings"])


class _Packed(NamedTuple):
    """The recorded samples as one row of tokens; arguments of ``MLLM.forward``."""

    ids: Tensor
    position_ids: Tensor
    document_ids: Tensor
    images: list[Tensor]
    semantic_slots: Tensor
    pixel_slots: Tensor
    target_positions: Tensor
    targets: Tensor


def _pack(recorded: Mapping[str, Tensor], vocabulary: Vocabulary, device: torch.device) -> _Packed:
    """Put every picture's layout where the official ids have their sign for a picture, and drop the padding."""
    columns: dict[str, list[int]] = {name: [] for name in _Packed._fields if name != "images"}
    images = []
    for sample, mask in enumerate(recorded["attention_mask"].bool()):
        start = len(columns["ids"])
        ids, labels = recorded["input_ids"][sample, mask], recorded["labels"][sample, mask]
        for token, label in zip(ids.tolist(), labels.tolist(), strict=True):
            place = len(columns["ids"])
            if token == IMAGE_ID:
                image = picture(recorded, sample, device)
                layout = image_layout((image.shape[-2], image.shape[-1]), vocabulary)
                images.append(image)
                columns["ids"].extend(layout.template)
                columns["semantic_slots"].extend(place + slot for slot in layout.semantic_slots)
                columns["pixel_slots"].extend(place + slot for slot in layout.pixel_slots)
                continue
            columns["ids"].append(token)
            if label != IGNORED:
                columns["target_positions"].append(place - 1)
                columns["targets"].append(label)
        length = len(columns["ids"]) - start
        columns["position_ids"].extend(range(length))
        columns["document_ids"].extend([sample] * length)
    tensors = {name: torch.tensor(values, device=device) for name, values in columns.items()}
    for name in ("ids", "position_ids", "document_ids"):
        tensors[name] = tensors[name][None]
    return _Packed(images=images, **tensors)


def picture(recorded: Mapping[str, Tensor], sample: int, device: torch.device) -> Tensor:
    """A sample's picture, (1, 3, H, W) in [-1, 1]."""
    return recorded[f"image{sample}_u8"].to(device).float() / 127.5 - 1


def _batch(mllm: MLLM, path: Path, device: torch.device) -> Iterator[Compared]:
    recorded = load_file(path)
    batch = _pack(recorded, mllm.vocabulary, device)
    with torch.no_grad():
        quantities = _features(mllm, recorded, device) | _hidden(mllm, batch)
    output = mllm(**batch._asdict())
    quantities["loss"] = output.loss
    expected = recorded | {"inputs_embeds": recorded["inputs_embeds"][recorded["out_attention_mask"].bool()]}
    for quantity, value in quantities.items():
        yield Compared(path, quantity, value, expected[quantity])
    gradients = path.with_name(path.stem + "_grads.json")
    if gradients.is_file():
        yield from _gradients(mllm, output.loss, gradients)


def _features(mllm: MLLM, recorded: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Features of every sample's picture; samples without one have a blank picture in the official batch."""
    images = [
        picture(recorded, sample, device)
        if f"image{sample}_u8" in recorded
        else torch.zeros(1, 3, 256, 256, device=device)
        for sample in range(len(recorded["input_ids"]))
    ]
    semantic, pixel = mllm.features(images)
    projected = torch.cat([mllm.semantic_adapter(semantic), mllm.pixel_adapter(pixel)])
    return {"vision_semantic": semantic[None], "vision_pixel": pixel[None], "projected": projected[None]}


def _hidden(mllm: MLLM, batch: _Packed) -> dict[str, Tensor]:
    embeds = mllm.embed(batch.ids, batch.images, batch.semantic_slots, batch.pixel_slots)
    hidden = mllm.hidden(embeds, batch.position_ids, batch.document_ids)[0]
    documents = batch.document_ids[0]
    is_last = torch.cat([documents.diff() != 0, documents.new_ones(1).bool()])
    return {
        "inputs_embeds": embeds[0],
        "logits_supervised": mllm.head.logits(hidden[batch.target_positions]),
        "logits_last": mllm.head.logits(hidden[is_last]),
    }


def _gradients(mllm: MLLM, loss: Tensor, path: Path) -> Iterator[Compared]:
    """Norms of the gradients under their published names."""
    recorded = json.loads(path.read_text())
    mllm.zero_grad()
    loss.backward()
    norms = {
        key: torch.stack([part.grad.norm() for part in parts if part.grad is not None]).norm()
        for key, parts in published_layout(mllm).items()
        if any(part.grad is not None for part in parts)
    }
    differing = norms.keys() ^ recorded["grad_l2"].keys()
    if differing:
        raise ValueError(f"{path.name}: {sorted(differing)[0]} has a gradient only here or only there.")
    for key, norm in recorded["grad_l2"].items():
        yield Compared(path, f"{key} l2", norms[key], torch.tensor(norm))
    mllm.zero_grad()
