"""Published DualViTok checkpoints: read, check, build and write (official release's layout).

Nothing is ever unpickled: files are read with ``weights_only`` or as safetensors.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from illume_lightning.nn.dualvitok import DualViTok
from illume_lightning.nn.noise import NoiseKind, TokenNoise
from illume_lightning.nn.pixel import PixelDecoder, PixelEncoder
from illume_lightning.nn.plain_file import load_plain, load_safetensors
from illume_lightning.nn.semantic import QwenVisionTower, SemanticDecoder, SemanticEncoder
from illume_lightning.nn.sharded_checkpoint import is_sharded, read_weights
from illume_lightning.nn.simvq import SimVQ
from illume_lightning.nn.whole_checkpoint import require_whole

CONTAINERS = ("model", "state_dict", "ema")


def read_state_dict(path: str | Path, *, use_ema: bool = False) -> dict[str, Tensor]:
    """Read a state dict from a published or our own checkpoint.

    Accepts ``.safetensors``, a raw state dict, and files that hold it under ``model``, ``state_dict`` or
    ``ema`` (official release), and Lightning checkpoints of this package (the prefix ``model.`` is removed), of one
    file or the folder of a sharded one.

    Args:
        path: the file, or the folder of a sharded checkpoint.
        use_ema: take ``ema`` where the file has it beside the raw weights.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no state dict, or can't be read without unpickling code.
    """
    path = Path(path)
    if is_sharded(path):
        return _of_model(read_weights(path))
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: give the path of a file.")
    if path.suffix == ".safetensors":
        return load_safetensors(path)
    require_whole(path)
    content = load_plain(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds no state dict but a {type(content).__name__}.")
    if use_ema and "ema" not in content:
        raise ValueError(f"{path} has no 'ema' entry; it has {sorted(map(str, content))[:8]}.")
    order = ("ema", *CONTAINERS) if use_ema else CONTAINERS
    is_lightning = "pytorch-lightning_version" in content
    for name in order:
        if isinstance(content.get(name), Mapping):
            content = content[name]
            break
    if not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict; its entries are {sorted(map(str, content))[:8]}.")
    if is_lightning:
        return _of_model(content)
    return {key.removeprefix("module."): value for key, value in content.items()}


def _of_model(content: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a Lightning checkpoint, named as in its module's ``model``."""
    return {key.removeprefix("model."): v for key, v in content.items() if key.startswith("model.")}


def load_dualvitok(model: DualViTok, path: str | Path, *, use_ema: bool = False) -> None:
    """Load a checkpoint into a model, strictly.

    Args:
        model: the tokenizer to fill.
        path: published ``pytorch_model.bin``, safetensors, or a checkpoint of ``DualViTokModule``.
        use_ema: as in ``read_state_dict``.

    Raises:
        ValueError: names the first keys that are missing, unexpected or of another shape.
    """
    state = read_state_dict(path, use_ema=use_ema)
    check_state_dict(model.state_dict(), state, str(path))
    model.load_state_dict(state)


def check_state_dict(own: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str) -> None:
    """Raise a ``ValueError`` that lists what keeps ``state`` from loading into ``own``; ``source`` names it."""
    shapes = [
        f"{key}: {tuple(state[key].shape)} in the file, {tuple(own[key].shape)} in the model"
        for key in own.keys() & state.keys()
        if own[key].shape != state[key].shape
    ]
    problems = {
        "of another shape": sorted(shapes),
        "missing in the file": sorted(own.keys() - state.keys()),
        "not in the model": sorted(state.keys() - own.keys()),
    }
    lines = [
        f"{len(names)} {kind}, first: {', '.join(names[:3])}" for kind, names in problems.items() if names
    ]
    if lines:
        raise ValueError(
            f"{source} does not fit this model: {'; '.join(lines)}. Build the model with the sizes that the "
            "checkpoint was trained with."
        )


def save_dualvitok(model: DualViTok, path: str | Path) -> None:
    """Write the published layout: a raw state dict (``pytorch_model.bin``), or ``.safetensors`` by suffix."""
    path = Path(path)
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    partial = path.with_name(path.name + ".partial")
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state, partial)
    else:
        torch.save(state, partial)
    partial.replace(path)


def build_official(
    config: Mapping[str, Any] | None = None, tower: Mapping[str, Any] | None = None
) -> DualViTok:
    """Build a DualViTok from the official release's config.

    Args:
        config: the dictionary under ``vq_model.config`` of a release config; what it leaves out has the
            released tokenizer's values.
        tower: sizes of the vision tower (``depth``, ``embed_dim``, ``num_heads``, ``hidden_size``), as in a
            Qwen2-VL vision config.

    Returns:
        The model with random weights and the release's noise (``neighbour``) where its drop rate is set.
    """
    config, tower = config or {}, tower or {}
    parts = {name: config.get(name, {}) for name in _OFFICIAL_PARTS}
    encoder, decoder = parts["semantic_encoder"], parts["semantic_decoder"]
    dims = {name: parts[name].get("dim", 32) for name in ("semantic_quantizer", "pixel_quantizer")}
    noise = None
    if config.get("pixel_drop_rate"):
        kind: NoiseKind = "zero" if config.get("pixel_noise_type", "random") == "zero" else "neighbour"
        noise = TokenNoise(kind, config.get("pixel_drop_batch_rate", 0.1), config["pixel_drop_rate"])
    return DualViTok(
        semantic_encoder=SemanticEncoder(
            QwenVisionTower(
                depth=tower.get("depth", 32),
                width=tower.get("embed_dim", 1280),
                num_heads=tower.get("num_heads", 16),
                out_features=tower.get("hidden_size", 3584),
            ),
            num_blocks=encoder.get("num_blocks", 4),
            width=encoder.get("embed_dim", 1280),
            code_dim=encoder.get("z_channels", 32),
        ),
        semantic_quantizer=SimVQ(
            parts["semantic_quantizer"].get("codebook_size", 32768), dims["semantic_quantizer"]
        ),
        semantic_decoder=SemanticDecoder(
            code_dim=decoder.get("z_channels", 32),
            num_blocks=decoder.get("num_blocks", 4),
            width=decoder.get("embed_dim", 1280),
            out_features=decoder.get("output_channels", 3584),
        ),
        pixel_encoder=PixelEncoder(**_official_convolutions(parts["pixel_encoder"], 128, 0, 32)),
        pixel_quantizer=SimVQ(parts["pixel_quantizer"].get("codebook_size", 98304), dims["pixel_quantizer"]),
        pixel_decoder=PixelDecoder(**_official_convolutions(parts["pixel_decoder"], 384, 1, 64)),
        noise=noise,
    )


_OFFICIAL_PARTS = (
    "semantic_encoder",
    "semantic_quantizer",
    "semantic_decoder",
    "pixel_encoder",
    "pixel_quantizer",
    "pixel_decoder",
)


def _official_convolutions(part: Mapping[str, Any], channels: int, more: int, latent: int) -> dict[str, Any]:
    """Arguments of our encoder or decoder; ``more``: blocks that MoVQGAN's decoder adds to the named count."""
    return {
        "channels": part.get("ch", channels),
        "multipliers": tuple(part.get("ch_mult", (1, 1, 2, 2, 4))),
        "num_res_blocks": part.get("num_res_blocks", 2) + more,
        "attention_levels": tuple(part.get("attn_resolutions", (4,))),
        "latent_channels": part.get("z_channels", latent),
        "resampling": "dc" if part.get("use_dc_up_down_blocks", True) else "origin",
    }
