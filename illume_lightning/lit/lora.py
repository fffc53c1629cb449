"""Low-rank adaptation of the language model's trunk, by peft."""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class LoRA:
    """Low-rank adaptation: small matrices beside the trunk's linear layers train instead of the LLM."""

    rank: int = 64
    """Inner width of the added matrices."""

    alpha: int = 128
    """Their output is multiplied by alpha / rank."""

    dropout: float = 0.0
    """Of their input in training."""

    def put_into(self, trunk: nn.Module) -> None:
        """Add the matrices; they follow from the run's seed alone, so that all devices begin with the same.

        Raises:
            ImportError: if peft is missing.
        """
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise ImportError("lora needs peft: pip install 'illume-lightning[lora]'") from error
        config = LoraConfig(
            r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules="all-linear"
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch.initial_seed())
            inject_adapter_in_model(config, trunk)

    @staticmethod
    def parameters(trunk: nn.Module) -> list[nn.Parameter]:
        """Those of a trunk that were added."""
        return [parameter for name, parameter in trunk.named_parameters() if ".lora_" in name]
