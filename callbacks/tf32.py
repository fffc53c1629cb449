"""TF32 in fp32 products and convolutions."""

from typing import Any

import lightning as L
import torch


class TF32(L.Callback):
    """Round the inputs of fp32 products and convolutions to TF32 while a run lasts: faster, 10 bits instead of 23.

    For NVIDIA GPUs from Ampere on. Without this callback torch takes TF32 for convolutions and not for products.
    Half-precision products are not touched, so with bf16-mixed there is little left to gain: SDXL's VAE, and the
    tokenizer where a run makes its codes itself, which may then differ from cached ones where two codes are nearly as
    near. The search for the nearest code is always exact, and so is ``illume parity``.

    Args:
        is_on: false computes both in full precision.
    """

    def __init__(self, is_on: bool = True) -> None:
        self.is_on = is_on
        self._before: list[bool] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Switch products and convolutions.

        Raises:
            ValueError: if it is on and the device has no TF32.
        """
        device = trainer.strategy.root_device
        if self.is_on and not _has_tf32(device):
            raise ValueError(
                f"callbacks.TF32 is for NVIDIA GPUs from Ampere on, and this run is on {device.type}: leave it out"
            )
        if not self._before:
            self._before = [backend.allow_tf32 for backend in _backends()]
        for backend in _backends():
            backend.allow_tf32 = self.is_on

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave both as they were."""
        if not self._before:  # nothing was switched
            return
        for backend, before in zip(_backends(), self._before, strict=True):
            backend.allow_tf32 = before
        self._before = []


def _backends() -> tuple[Any, Any]:
    # Not by fp32_precision: torch's compiler asks for allow_tf32, and refuses to tell where only the other was set.
    return torch.backends.cuda.matmul, torch.backends.cudnn


def _has_tf32(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
