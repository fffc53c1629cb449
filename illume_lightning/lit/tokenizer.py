"""A trained DualViTok, from wherever it lies."""

import hashlib
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser
from torch import nn

from illume_lightning.nn.checkpoints import build_official, load_dualvitok
from illume_lightning.nn.dualvitok import DualViTok


def load_tokenizer(path: str | Path) -> DualViTok:
    """Build and fill a tokenizer, frozen and in evaluation mode.

    Args:
        path: folder of a DualViTok run, one of its checkpoints, or a published ``pytorch_model.bin``.

    Raises:
        FileNotFoundError: if there is no such run or file.
        ValueError: if the file does not fit the model.
    """
    path = Path(path)
    run, checkpoint = path, path / "checkpoints" / "last.ckpt"
    if not path.is_dir():
        run, checkpoint = path.parent.parent, path
    if not checkpoint.is_file():
        raise FileNotFoundError(
            f"no tokenizer at {path}: train one (`illume fit -c experiments/shapes/dualvitok.yaml`), or give "
            "the folder of a run, a checkpoint, or a published pytorch_model.bin"
        )
    config = run / "config.yaml"
    is_published = not path.is_dir() and not (path.suffix == ".ckpt" and config.is_file())
    model = build_official() if is_published else _build(config)
    load_dualvitok(model, checkpoint)
    return model.requires_grad_(False).eval()


def fingerprint(network: nn.Module) -> str:
    """Hash of all weights and buffers (sha256, hexadecimal)."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_cached_codes(maker: str, own: str, path: str | None, command: str) -> None:
    """Refuse codes of another tokenizer.

    Args:
        maker: fingerprint of the tokenizer that made the codes.
        own: fingerprint of the tokenizer in use.
        path: where that one is from.
        command: makes the codes.

    Raises:
        ValueError: names both tokenizers.
    """
    if maker != own:
        raise ValueError(
            f"the cached codes were made by another tokenizer (fingerprint {maker[:12]}) than {path} "
            f"({own[:12]}): prepare them again with `{command}`"
        )


def _build(config: Path) -> DualViTok:
    """The model that a run's saved configuration describes."""
    section: dict[str, Any] = yaml.safe_load(config.read_text())["model"]["init_args"]["model"]
    encoder = (section.get("init_args") or {}).get("semantic_encoder")
    if encoder is not None:
        encoder["init_args"]["model"]["init_args"]["pretrained"] = None  # the checkpoint has the tower
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(DualViTok, "model")
    return parser.instantiate_classes(parser.parse_object({"model": section})).model
