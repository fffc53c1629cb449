"""`torch.npu`: what torch, Lightning and the package call."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

_device = torch.ops.simulated_npu
Event = partial(torch.Event, device="npu")


class GradScaler(torch.amp.GradScaler):
    """torch's, whose reciprocal of the scale is of fp64."""

    def __init__(self, **options: Any) -> None:
        super().__init__("npu", **options)

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        _device.refuse_fp64(False)
        try:
            super().unscale_(optimizer)
        finally:
            _device.refuse_fp64(True)


amp = SimpleNamespace(GradScaler=GradScaler)


class device:
    """Context in which a device is the current one."""

    def __init__(self, device: Any) -> None:
        self.index = _index(device)

    def __enter__(self) -> None:
        self.before = current_device()
        set_device(self.index)

    def __exit__(self, *_: Any) -> None:
        set_device(self.before)


def set_device_count(count: int) -> None:
    _device.set_device_count(count)


def device_count() -> int:
    return _device.device_count()


def is_available() -> bool:
    return device_count() > 0


def is_initialized() -> bool:
    return True


def is_bf16_supported() -> bool:
    return True


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.float16, torch.bfloat16, torch.float32]


def current_device() -> int:
    return _device.current_device()


def set_device(device: Any) -> None:
    _device.set_device(_index(device))


def get_device_name(device: Any = None) -> str:
    return "Simulated NPU"


def get_device_properties(device: Any = None) -> SimpleNamespace:
    return SimpleNamespace(name=get_device_name(device), total_memory=2**34)


def synchronize(device: Any = None) -> None:
    pass


def empty_cache() -> None:
    pass


def memory_stats(device: Any = None) -> dict[str, int]:
    return {
        "allocated_bytes.all.current": memory_allocated(),
        "allocated_bytes.all.peak": max_memory_allocated(),
    }


def memory_allocated(device: Any = None) -> int:
    return _device.memory(False)


def max_memory_allocated(device: Any = None) -> int:
    return _device.memory(True)


def reset_peak_memory_stats(device: Any = None) -> None:
    _device.reset_peak_memory()


# -- random numbers --


def _is_in_bad_fork() -> bool:
    return False


def manual_seed(seed: int) -> None:
    _device.manual_seed(current_device(), seed)


def manual_seed_all(seed: int) -> None:
    for index in range(device_count()):
        _device.manual_seed(index, seed)


def get_rng_state(device: Any = None) -> torch.Tensor:
    return _device.get_rng_state(_index(device))


def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
    _device.set_rng_state(_index(device), state)


# -- streams --


def Stream(device: Any = None, priority: int = 0, **_: Any) -> torch.Stream:
    return torch.Stream(torch.device("npu", _index(device)), priority=priority)


def current_stream(device: Any = None) -> torch.Stream:
    return torch.accelerator.current_stream(_index(device))


default_stream = current_stream


def stream(stream: torch.Stream | None) -> AbstractContextManager[Any]:
    return nullcontext() if stream is None else stream


def _index(device: Any) -> int:
    if device is None:
        return current_device()
    index = device if isinstance(device, int) else torch.device(device).index
    return current_device() if index is None else index
