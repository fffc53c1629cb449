"""Folders as ``illume fit`` leaves them, of models small enough for a test."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from tiny import build_tiny
from tiny_mllm import build_mllm
from torch import nn

from illume_lightning.data.text_tokenizer import TextTokenizer
from illume_lightning.lit.lora import LoRA
from illume_lightning.lit.mllm import MLLMStage3
from illume_lightning.lit.tokenizer import fingerprint
from illume_lightning.nn.dualvitok import DualViTok
from illume_lightning.nn.mllm import MLLM


def write_run(folder: Path, model: nn.Module, config: dict[str, Any], **more: Any) -> Path:
    """A run's folder with a model's weights; ``more``: other entries of the checkpoint."""
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    (folder / "checkpoints").mkdir(parents=True)
    saved = {"pytorch-lightning_version": "2", "state_dict": state, **more}
    torch.save(saved, folder / "checkpoints" / "last.ckpt")
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def write_dualvitok_run(folder: Path) -> DualViTok:
    """Returns the model."""
    torch.manual_seed(3)
    model = build_tiny().eval()
    section = {"class_path": "tiny.build_tiny", "init_args": {}}
    module = {
        "class_path": "illume_lightning.lit.dualvitok.DualViTokModule",
        "init_args": {"model": section},
    }
    write_run(folder, model, {"model": module})
    return model


def write_mllm_run(
    folder: Path, text: TextTokenizer, dualvitok: DualViTok, lora: LoRA | None = None, **options: Any
) -> MLLM:
    """A stage 3 that makes pictures of 32 x 32 and looks at some of 64 x 64; returns its model.

    ``options``: of ``build_mllm``.
    """
    vocabulary = text.vocabulary(64, 96, size_step=16)
    torch.manual_seed(4)
    mllm = build_mllm(vocabulary=vocabulary, **options)
    if mllm.slot_embedding is not None:
        nn.init.normal_(mllm.slot_embedding.weight)
    if lora is not None:
        MLLMStage3(mllm, 0, lora).configure_model()
        for name, parameter in mllm.trunk.named_parameters():
            if ".lora_" in name:
                nn.init.normal_(parameter, std=0.3)
    section = {
        "class_path": "tiny_mllm.build_mllm",
        "init_args": {**options, "vocabulary": asdict(vocabulary)},
    }
    config = {
        "model": {
            "class_path": "illume_lightning.lit.mllm.MLLMStage3",
            "init_args": {"mllm": section, "lora": asdict(lora) if lora else None},
        },
        "data": {"init_args": {"text_tokenizer": str(text.folder), "release_prompts": False}},
        "curriculum": {
            "phases": [
                {
                    "until_step": 1,
                    "mode": "any_resolution",
                    "side": 64,
                    "generation_side": 32,
                    "batch_size": 1,
                    "micro_batch_size": 1,
                }
            ]
        },
    }
    write_run(folder, mllm, config, tokenizer_fingerprint=fingerprint(dualvitok))
    return mllm.eval()
