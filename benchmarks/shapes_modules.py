"""The modules of experiments/shapes on made-up batches of their sizes; nothing is read but their YAML."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from jsonargparse import ArgumentParser

from benchmarks.steps import picture_batch
from illume_lightning.budget.sample_batch import sample_batch
from illume_lightning.data.schedule import Phase
from illume_lightning.lit.mllm import MLLMStage
from illume_lightning.lit.training import TrainingModule
from illume_lightning.nn.dualvitok import DualViTok

EXPERIMENTS = Path(__file__).parents[1] / "experiments" / "shapes"
PARTS = ("dualvitok", "diffusion_decoder", "mllm_stage2")


@dataclass(frozen=True)
class Part:
    """A module to train."""

    name: str
    module: TrainingModule
    phase: Phase
    """The last one of its curriculum."""

    def batches(self, micro_batch_size: int, count: int) -> list[Any]:
        """Micro-batches of the phase's largest pictures."""
        if not isinstance(self.module, MLLMStage):
            size = self.phase.largest_size
            return [picture_batch(micro_batch_size, size, seed) for seed in range(count)]
        phase = replace(self.phase, micro_batch_size=micro_batch_size, batch_size=micro_batch_size)
        data = {"row_tokens": 512, "train": {"editing": {"tokens": ["cached"]}}}
        batch: Any = sample_batch(self.module, phase, data, None)
        generator = torch.Generator().manual_seed(0)
        noise = [
            torch.randint(256, images.shape, dtype=torch.uint8, generator=generator)
            for images in batch.images
        ]
        return [batch._replace(images=noise)] * count


def build(name: str, is_toy: bool) -> Part:
    """A module with random weights, the same in every call.

    Args:
        name: of the experiment.
        is_toy: smaller pictures and batches.
    """
    config = yaml.safe_load((EXPERIMENTS / f"{name}.yaml").read_text())
    torch.manual_seed(0)
    module = instantiate(config["model"], L.LightningModule)
    tokenizer = yaml.safe_load((EXPERIMENTS / "dualvitok.yaml").read_text())["model"]["init_args"]["model"]
    if name != "dualvitok":
        module.fixed["tokenizer"] = instantiate(tokenizer, DualViTok).requires_grad_(False).eval()
    else:
        module.codebook_start = None
    phase = Phase(**config["curriculum"]["phases"][-1])
    if is_toy:
        phase = replace(phase, mode="fixed", side=64, batch_size=2, micro_batch_size=2)
        if name == "diffusion_decoder":
            module.model.sizes = [(64, 64)]
    return Part(name, module, phase)


def instantiate(section: dict[str, Any], kind: type) -> Any:
    """What a section of a configuration describes."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, "part")
    return parser.instantiate(parser.parse_object({"part": section})).part


def samples(batches: Sequence[Any]) -> int:
    """In all."""
    return sum(len(batch.index) for batch in batches)
