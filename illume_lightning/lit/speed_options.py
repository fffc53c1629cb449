"""Whether a device can do what a module's options for speed ask of it."""

import os
import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch


def check_speed_options(accelerator: str, model: Mapping[str, Any]) -> None:
    """Refuse what a device or this installation can't do, before anything is built.

    Args:
        accelerator: cpu, cuda, npu, ...
        model: ``class_path`` and ``init_args`` of the LightningModule.

    Raises:
        ValueError: names the option and what it lacks.
    """
    given = model.get("init_args") or {}
    if given.get("channels_last") and accelerator == "npu":
        raise ValueError(
            "model.channels_last is not for NPUs, which order memory by themselves: leave it out"
        )
    if given.get("compile"):
        _check_compiler(accelerator)


def _check_compiler(accelerator: str) -> None:
    if accelerator == "npu":
        raise ValueError("model.compile is not for NPUs, for which torch makes no kernels: leave it out")
    if accelerator == "cuda" and (torch.cuda.get_device_capability() < (7, 0) or find_spec("triton") is None):
        raise ValueError(
            "model.compile needs the package triton and a GPU from Volta on, and this is "
            f"{torch.cuda.get_device_name()}: install triton, or leave compile out"
        )
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ValueError(
            f"model.compile needs a C++ compiler, and there is no {compiler}: install one, name it in the variable "
            "CXX, or leave compile out"
        )
