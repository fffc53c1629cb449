"""Ascend NPUs: the accelerator that Lightning lacks, and why there is none where there is none.

Importing this makes ``Trainer(accelerator="npu", strategy="npu_...")`` known; the strategies are in
``npu_strategies``. torch_npu is imported only here, by ``load``, once an NPU is asked for or looked for.

Where torch_npu is installed, ``import torch`` imports it too, and fails as a whole where CANN is missing. The
environment variable ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` keeps torch from that; transformers still imports it.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry

__all__ = ["NAME", "NPUAccelerator", "check_index", "check_installation", "count", "is_available", "load"]

NAME = "npu"
"""Of the accelerator, and of its devices in torch."""


def load() -> Any:
    """The module ``torch.npu``; torch's seed is the devices' from now on.

    Raises:
        ImportError: torch_npu or CANN is missing; says how to get it.
    """
    if not hasattr(torch, NAME):
        if importlib.util.find_spec("torch_npu") is None:
            raise ImportError(
                "npu devices need torch_npu, which is not installed: install CANN, then "
                "pip install 'illume-lightning[npu]'"
            )
        try:
            import torch_npu  # noqa: F401
        except (ImportError, OSError, RuntimeError) as error:
            raise ImportError(
                f"torch_npu is installed and can't be loaded ({_first_line(error)}): install CANN, and `source "
                "set_env.sh` in its folder, or pip uninstall torch_npu"
            ) from error
        # Seeding has come before in `illume fit`, and reaches only the devices that torch knew then.
        torch.npu.manual_seed_all(torch.initial_seed())
    return torch.npu


def check_installation() -> None:
    """Refuse to start where torch_npu is installed and broken: transformers imports it too, and says less.

    Raises:
        ImportError: says what is missing.
    """
    if importlib.util.find_spec("torch_npu") is not None:
        load()


def is_available() -> bool:
    """Whether torch_npu is installed and sees an NPU.

    Raises:
        ImportError: torch_npu is installed and broken; the CPU is not taken instead in silence.
    """
    check_installation()
    return hasattr(torch, NAME) and bool(load().is_available())


def count() -> int:
    """Number of NPUs, at least 1.

    Raises:
        ImportError: torch_npu or CANN is missing.
        ValueError: there is no NPU.
    """
    number = int(load().device_count())
    if number < 1:
        raise ValueError(
            "torch_npu sees no NPU: `npu-smi info` lists them, and ASCEND_RT_VISIBLE_DEVICES hides those that it "
            "doesn't name"
        )
    return number


def check_index(index: int | None) -> None:
    """Refuse a device that isn't there; ``None`` is any.

    Raises:
        ImportError: torch_npu or CANN is missing.
        ValueError: there is no NPU, or none of this index.
    """
    _check_indices([] if index is None else [index])


class NPUAccelerator(Accelerator):
    """Ascend NPUs, by torch_npu.

    Raises:
        ImportError: torch_npu or CANN is missing.
        ValueError: there is no NPU.
    """

    def __init__(self) -> None:
        super().__init__()
        count()

    def setup_device(self, device: torch.device) -> None:
        """Make a device this process's.

        Raises:
            ValueError: the strategy would compute elsewhere.
        """
        if device.type != NAME:
            raise ValueError(
                f"accelerator npu with a strategy that computes on {device}: choose a strategy of npu, such as "
                "npu_single_device or npu_ddp"
            )
        load().set_device(device)

    def setup(self, trainer: L.Trainer) -> None:
        """Leave the device's memory to this run."""
        load().empty_cache()

    def teardown(self) -> None:
        """Give cached memory back."""
        load().empty_cache()

    def get_device_stats(self, device: Any) -> dict[str, float]:
        """Memory of a device, as ``torch.npu.memory_stats``."""
        return {name: float(value) for name, value in load().memory_stats(device).items()}

    @staticmethod
    def parse_devices(devices: int | str | Sequence[int]) -> list[int]:
        """Indices of the devices: a number of them, -1 or "auto" for all, or a list such as "0,2".

        Raises:
            ValueError: if they aren't there, or it isn't any of these.
        """
        if isinstance(devices, str):
            devices = _parse(devices.strip())
        if not isinstance(devices, int):
            return _check_indices(devices)
        there = count()
        if devices == -1:
            devices = there
        if not 1 <= devices <= there:
            raise ValueError(
                f"devices is {devices}, and there {_are(there)}: choose 1 to {there}, or a list of indices"
            )
        return list(range(devices))

    @staticmethod
    def get_parallel_devices(devices: Sequence[int]) -> list[torch.device]:
        """The devices of indices."""
        return [torch.device(NAME, index) for index in devices]

    @staticmethod
    def auto_device_count() -> int:
        """All there are."""
        return count()

    @staticmethod
    def is_available() -> bool:
        """Whether there is an NPU."""
        return is_available()

    @staticmethod
    def name() -> str:
        """As in ``Trainer(accelerator=...)``."""
        return NAME

    @classmethod
    def register_accelerators(cls, accelerator_registry: Any) -> None:
        """Make it known by its name."""
        accelerator_registry.register(NAME, cls, description="Ascend NPUs")


def _parse(devices: str) -> int | list[int]:
    if devices == "auto":
        return -1
    try:
        numbers = [int(number) for number in devices.strip("[]").split(",") if number.strip()]
    except ValueError:
        numbers = []
    if not numbers:
        raise ValueError(f"devices is {devices!r}: give a number of NPUs, indices such as 0,2, or auto")
    return numbers if "," in devices or "[" in devices else numbers[0]


def _check_indices(indices: Sequence[int]) -> list[int]:
    there = count()
    wrong = [index for index in indices if not 0 <= index < there]
    if wrong:
        raise ValueError(f"there is no npu:{wrong[0]}: there {_are(there)}, counted from 0")
    if len(set(indices)) < len(indices):
        raise ValueError(f"devices is {list(indices)}: name each NPU once")
    return list(indices)


def _are(number: int) -> str:
    return "is 1 NPU" if number == 1 else f"are {number} NPUs"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


NPUAccelerator.register_accelerators(AcceleratorRegistry)
