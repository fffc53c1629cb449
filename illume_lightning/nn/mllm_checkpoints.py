"""MLLM weights on disk: plain Qwen2.5 folders in, the official release's layout in and out.

Only safetensors and ``weights_only`` files are read; nothing is ever unpickled.
"""

import json
import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Qwen2Model

from illume_lightning.nn.checkpoints import check_state_dict, read_state_dict
from illume_lightning.nn.hollow import WithoutWeights, hollow
from illume_lightning.nn.mllm import MLLM, Attention, build_trunk
from illume_lightning.nn.pixel import PixelEncoder
from illume_lightning.nn.plain_file import load_safetensors
from illume_lightning.nn.published_vocabulary import vocabulary_from
from illume_lightning.nn.semantic import QwenVisionTower
from illume_lightning.vocabulary import MARKERS

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
SEMANTIC_ENCODER = "model.vision_tower.semantic_encoder."
PIXEL_ENCODER = "model.vision_tower.pixel_encoder."
SLOT_EMBEDDING = "model.slot_embedding."
"""Ours; published checkpoints have no slot embedding."""

OPTIONAL = (SEMANTIC_ENCODER, PIXEL_ENCODER, SLOT_EMBEDDING)
"""Parts that a file may leave out as a whole."""

SHARD_BYTES = 5_000_000_000

CONFIG_NAMES = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "mlp_width": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
}
"""Arguments of ``build_trunk`` and their names in ``config.json``; the base of RoPE stands in one of two places."""


def trunk_from(folder: str | Path, attention: Attention = "sdpa") -> Qwen2Model:
    """A trunk with random weights and the sizes of a Qwen2.5 folder, or of one written by ``save_mllm``.

    Args:
        folder: holds ``config.json``.
        attention: as ``build_trunk``.

    Raises:
        FileNotFoundError: there is no ``config.json``.
        ValueError: it lacks a size, or asks for what the trunk doesn't have (scaled RoPE, sliding windows).
    """
    return build_trunk(**_sizes(Path(folder)), attention=attention)


def load_qwen(mllm: MLLM, folder: str | Path) -> None:
    """Start from a plain Qwen2.5: trunk and text rows, strictly.

    Qwen's tables have more rows than its tokenizer has tokens. The vision rows with these ids take them over
    (official release: ids 151,665 to 151,935); all other vision rows stay as initialised, normal with the
    standard deviation that the MLLM was built with, 0.02 unless told.

    Args:
        mllm: to fill.
        folder: in transformers' layout, ``config.json`` and safetensors, sharded or not.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the weights don't fit; names what differs.
    """
    folder = Path(folder)
    _check_sizes(mllm, folder)
    state = _read_folder(folder)
    _settle_head(mllm, state, str(folder))
    layout = {key: parts for key, parts in published_layout(mllm).items() if not key.startswith(_NOT_QWEN)}
    for key in (EMBEDDING, HEAD):
        if key in layout and key in state:
            text, vision = layout[key]
            num_vision = len(state[key]) - len(text)
            if num_vision < 0:
                raise ValueError(
                    f"{folder}: {key} has {len(state[key])} rows, the vocabulary {len(text)} text tokens: set num_text "
                    "to the length of this model's tokenizer."
                )
            layout[key] = text, vision.detach()[:num_vision]
            state[key] = state[key][: sum(map(len, layout[key]))]
    _fill(layout, state, str(folder))


_NOT_QWEN = ("model.vision_tower.", "model.mm_projector.", SLOT_EMBEDDING)


def load_mllm(mllm: MLLM, path: str | Path) -> list[str]:
    """Load a published checkpoint in origin format, or one of ``save_mllm``, strictly.

    Args:
        mllm: to fill.
        path: a folder with ``model.safetensors`` or its shards and index, or one file. Where the folder has a
            ``config.json``, the trunk's sizes are checked against it.

    Returns:
        Prefixes of the parts that the file leaves out and that keep their weights: of the vision tower's two
        encoders and the slot embedding.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the weights don't fit; names what differs.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        _check_sizes(mllm, path)
    state = _read_folder(path) if path.is_dir() else read_state_dict(path)
    _settle_head(mllm, state, str(path))
    layout = published_layout(mllm)
    absent = [prefix for prefix in OPTIONAL if _has(layout, prefix) and not _has(state, prefix)]
    _fill(
        {key: parts for key, parts in layout.items() if not key.startswith(tuple(absent))}, state, str(path)
    )
    return absent


def read_mllm(
    folder: str | Path,
    semantic_encoder: QwenVisionTower | None = None,
    pixel_encoder: PixelEncoder | None = None,
    attention: Attention = "sdpa",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> MLLM:
    """Build the MLLM of a published folder in origin format, or of one of ``save_mllm``.

    The trunk's sizes, whether the head is tied, the vocabulary and its unused rows follow from the folder. Weights
    go one by one from the files to the device; there is no second copy of them.

    Args:
        folder: ``config.json``, ``model.safetensors`` or its shards and index, and a ``tokenizer.json`` that is
            extended by the vision tokens.
        semantic_encoder: a tower of the model's sizes, which is left as it is; by default full size. Its weights
            are taken only where the folder has none: the official release writes the vision tower into its
            checkpoints where it was fine-tuned, and elsewhere takes the DualViTok's.
        pixel_encoder: the same for the pixel branch.
        attention: as ``build_trunk``.
        device: of the weights.
        dtype: of the weights; the angles of rotary embeddings stay fp32.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the folder has another layout, or its parts don't fit; names what differs.
    """
    folder = Path(folder)
    state = _read_folder(folder)
    if EMBEDDING not in state:
        raise ValueError(
            f"{folder} has no {EMBEDDING}, so it is not in the official release's origin format: give the repository "
            "without '-hf' in its name"
        )
    tied = HEAD not in state or bool(
        json.loads((folder / "config.json").read_text()).get("tie_word_embeddings")
    )
    slots = state.get(f"{SLOT_EMBEDDING}weight")
    has_norms = "model.mm_projector.projector_1.3.weight" in state
    with WithoutWeights():
        mllm = MLLM(
            trunk_from(folder, attention),
            vocabulary_from(folder, len(state[EMBEDDING])),
            QwenVisionTower() if semantic_encoder is None else hollow(semantic_encoder),
            PixelEncoder() if pixel_encoder is None else hollow(pixel_encoder),
            tied,
            0 if slots is None else math.isqrt(len(slots) // 2),
            adapter_rms=float(has_norms),
        )
    _settle_head(mllm, state, str(folder))
    for prefix, tower in ((SEMANTIC_ENCODER, semantic_encoder), (PIXEL_ENCODER, pixel_encoder)):
        if not _has(state, prefix) and tower is not None:
            state |= {prefix + key: value for key, value in tower.state_dict().items()}
        elif not _has(state, prefix):
            raise ValueError(f"{folder} has no weights of {prefix[:-1]}: give the DualViTok, which has them")
    layout = published_layout(mllm)
    _check(layout, state, str(folder))
    names = {id(parameter): name for name, parameter in mllm.named_parameters()}
    own = {
        names[id(part)]: rows.to(device, dtype, copy=True)
        for key, parts in layout.items()
        for part, rows in zip(parts, state[key].split([len(part) for part in parts]), strict=True)
    }
    mllm.load_state_dict(own, assign=True)
    return mllm.to(device)


def save_mllm(mllm: MLLM, folder: str | Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the published origin format: ``config.json`` and safetensors, with an index where there are shards.

    A tokenizer that knows the vision tokens belongs beside them: ``illume export`` writes it.

    The folder appears only when all of it is written.

    Args:
        mllm: to write, in the types that its weights have.
        folder: must not exist.
        shard_bytes: a file holds no more, except that a single larger tensor has its own.

    Raises:
        ValueError: the folder exists, or the model reads pictures in a way that this format can't tell.
    """
    folder = Path(folder)
    if mllm.discrete_input or mllm.vocabulary.pixel_first:
        raise ValueError(
            "the published format is of models with continuous input and semantic rows first: an MLLM with "
            "discrete_input or pixel_first can't be written in it; use the run itself."
        )
    if folder.exists():
        raise ValueError(f"{folder} exists: choose another folder, or remove it.")
    layout = published_layout(mllm)
    shards = _shards(layout, shard_bytes)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        total = sum(_num_bytes(parts) for parts in layout.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    for name, keys in zip(names, shards, strict=True):
        tensors = {key: torch.cat([part.detach().cpu() for part in layout[key]]) for key in keys}
        save_file(tensors, partial / name, metadata={"format": "pt"})
    (partial / "config.json").write_text(json.dumps(_config(mllm), indent=1))
    partial.rename(folder)


def published_layout(mllm: MLLM) -> dict[str, tuple[Tensor, ...]]:
    """Published key -> the model's own tensors that stand there, one below the other (text rows, vision rows)."""
    layout: dict[str, tuple[Tensor, ...]] = {EMBEDDING: mllm.embedding.tables}
    modules: dict[str, nn.Module] = {
        "model.": mllm.trunk,
        "model.mm_projector.projector_1.": mllm.semantic_adapter,
        "model.mm_projector.projector_2.": mllm.pixel_adapter,
        SEMANTIC_ENCODER: mllm.semantic_encoder,
        PIXEL_ENCODER: mllm.pixel_encoder,
    }
    if mllm.slot_embedding is not None:
        modules[SLOT_EMBEDDING] = mllm.slot_embedding
    for prefix, module in modules.items():
        layout |= {prefix + key: (value,) for key, value in module.state_dict(keep_vars=True).items()}
    if not mllm.head.is_tied:
        layout[HEAD] = mllm.head.tables
    return layout


def _fill(layout: Mapping[str, tuple[Tensor, ...]], state: Mapping[str, Tensor], source: str) -> None:
    """Copy published tensors into the model, after all of them were found to fit."""
    _check(layout, state, source)
    with torch.no_grad():
        for key, parts in layout.items():
            for part, rows in zip(parts, state[key].split([len(part) for part in parts]), strict=True):
                part.copy_(rows)


def _check(layout: Mapping[str, tuple[Tensor, ...]], state: Mapping[str, Tensor], source: str) -> None:
    own = {
        key: torch.empty(sum(map(len, parts)), *parts[0].shape[1:], device="meta")
        for key, parts in layout.items()
    }
    check_state_dict(own, state, source)


def _settle_head(mllm: MLLM, state: dict[str, Tensor], source: str) -> None:
    """Take the head out of a state that a tied model loads; raise where one of them is tied and the other not."""
    if mllm.head.is_tied and HEAD in state and EMBEDDING in state:
        if not torch.equal(state.pop(HEAD), state[EMBEDDING]):
            raise ValueError(
                f"{source} has a head of its own, this MLLM's is tied: build it with tied=False."
            )
    elif not mllm.head.is_tied and HEAD not in state:
        raise ValueError(f"{source} has no {HEAD}, its head is tied: build the MLLM with tied=True.")


def _read_folder(folder: Path) -> dict[str, Tensor]:
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: give one with config.json and safetensors.")
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = _weight_files(index)
    state: dict[str, Tensor] = {}
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}: the folder is incomplete, or not in safetensors."
            )
        state |= load_safetensors(folder / name)
    return state


def _weight_files(index: Path) -> list[str]:
    """Names of the files that an index lists, all of which lie beside it."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of safetensors files: {error}") from error
    for name in names:
        if name != Path(name).name:
            raise ValueError(
                f"{index} names {name!r}, which is not beside it: only files of the folder are read."
            )
    return names


def _sizes(folder: Path) -> dict[str, Any]:
    """Arguments of ``build_trunk`` that a ``config.json`` stands for."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: give a folder in transformers' layout.")
    config = json.loads(path.read_text())
    rope = config.get("rope_parameters") or {}
    config.setdefault("rope_theta", rope.get("rope_theta"))
    missing = [name for name in (*CONFIG_NAMES.values(), "rope_theta") if config.get(name) is None]
    if missing:
        raise ValueError(
            f"{path} has no {', '.join(missing)}: it is not the config of a Qwen2 language model."
        )
    if config.get("rope_scaling") or rope.get("rope_type", "default") != "default":
        raise ValueError(f"{path} asks for a scaled RoPE, which the trunk doesn't have.")
    if config.get("use_sliding_window") or config.get("hidden_act", "silu") != "silu":
        raise ValueError(
            f"{path} asks for sliding windows or another activation than SiLU; the trunk has neither."
        )
    return {ours: config[name] for ours, name in CONFIG_NAMES.items()} | {"rope_base": config["rope_theta"]}


def _own_sizes(mllm: MLLM) -> dict[str, Any]:
    config = mllm.trunk.config
    sizes = {ours: getattr(config, name) for ours, name in CONFIG_NAMES.items()}
    assert config.rope_parameters is not None
    return sizes | {"rope_base": config.rope_parameters["rope_theta"]}


def _check_sizes(mllm: MLLM, folder: Path) -> None:
    """Raise where the trunk's sizes are not the folder's; shapes alone don't tell heads, RoPE base and epsilon."""
    theirs, own = _sizes(folder), _own_sizes(mllm)
    differing = [
        f"{name} {theirs[name]} in the folder, {own[name]} in the model"
        for name in theirs
        if name != "max_positions" and not math.isclose(theirs[name], own[name])
    ]
    if differing:
        raise ValueError(
            f"{folder} does not fit this trunk: {'; '.join(differing)}. Build it with trunk_from({str(folder)!r})."
        )


def _config(mllm: MLLM) -> dict[str, Any]:
    sizes = _own_sizes(mllm)
    return {
        "model_type": "qwen2",
        "hidden_act": "silu",
        "vocab_size": mllm.vocabulary.size,
        "text_token_num": mllm.vocabulary.num_text,
        "special_tokens_ids": [mllm.vocabulary.num_text + number for number in range(len(MARKERS))],
        "vision_tokenizer_levels": 2,
        # The vision tower's weights are among these and not the tokenizer's.
        "unfreeze_mm_vision_tower": True,
        "tie_word_embeddings": mllm.head.is_tied,
        "mm_hidden_size": [mllm.semantic_encoder.out_features, mllm.pixel_encoder.latent_channels],
        "rope_theta": sizes["rope_base"],
    } | {name: sizes[ours] for ours, name in CONFIG_NAMES.items()}


def _shards(layout: Mapping[str, tuple[Tensor, ...]], shard_bytes: int) -> list[list[str]]:
    """Keys of every file, in order; a new one is begun where the next tensor would not fit."""
    shards: list[list[str]] = [[]]
    filled = 0
    for key, parts in layout.items():
        if shards[-1] and filled + _num_bytes(parts) > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += _num_bytes(parts)
    return shards


def _num_bytes(parts: Iterable[Tensor]) -> int:
    return sum(part.numel() * part.element_size() for part in parts)


def _has(keys: Iterable[str], prefix: str) -> bool:
    return any(key.startswith(prefix) for key in keys)
