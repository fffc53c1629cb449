"""The device that a command computes on, by its name."""

import torch

from illume_lightning.lit import npu


def choose_device(name: str) -> torch.device:
    """``auto`` is the first accelerator that torch knows here, NPUs included, else the CPU.

    Raises:
        ImportError: an NPU is named and torch_npu is missing, or it is installed and CANN is missing.
        ValueError: it is no device's name, or an NPU that isn't there.
    """
    if name == "auto":
        npu.is_available()  # torch knows them once torch_npu is loaded
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if name.partition(":")[0] == npu.NAME:
        npu.load()
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r}: {str(error).splitlines()[0]}") from error
    if device.type == npu.NAME:
        npu.check_index(device.index)
    return device
