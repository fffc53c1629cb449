"""How a run is spread over Ascend NPUs: one, copies of the model by DDP, or shards of it by FSDP2.

What ``--trainer.strategy`` names, with ``--trainer.accelerator npu``:

========================================  =====================================================================
``auto``                                  ``single_device`` for one NPU, ``ddp`` for several
``single_device``                         one NPU, the one of ``--trainer.devices [index]``
``ddp``                                   a copy of the model on each, over HCCL
``ddp_find_unused_parameters_true``       the same, for steps that leave parameters out
``fsdp2``, ``fsdp2_sharded``              shards of the model on each, for modules that ``lit.sharding`` can share out
========================================  =====================================================================

Lightning's registry has them as ``npu_single_device`` and so on; ``trainer_options`` adds the prefix. Their classes
can be named as ``class_path`` too, with arguments of their own.
"""

from collections.abc import Mapping
from pkgutil import resolve_name
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.strategies import (
    DDPStrategy,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
)
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from illume_lightning.lit.npu import NAME, NPUAccelerator, is_available, load
from illume_lightning.lit.sharding import FSDP2Strategy

__all__ = ["NPUDDPStrategy", "NPUFSDP2Strategy", "NPUSingleDeviceStrategy", "trainer_options"]

_PREFIX = f"{NAME}_"


class _OnNPU(Strategy):
    """Autocast, loss scaling and averages of NPUs, where Lightning takes CUDA's for granted."""

    @property
    def precision_plugin(self) -> Precision:
        """Of NPUs, whatever was set."""
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if plugin is not None:
            _check_precision(str(plugin.precision))
        if type(plugin) is MixedPrecision and plugin.device != NAME:
            kind: Any = plugin.precision
            # torch_npu's own scaler also sees overflows on devices that have no infinity.
            plugin = MixedPrecision(kind, NAME, load().amp.GradScaler() if kind == "16-mixed" else None)
        self._precision_plugin = plugin


class _ReducesBySum(_OnNPU):
    """Of several processes."""

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce a tensor over processes; HCCL has no average, so that is the sum divided."""
        is_mean = isinstance(reduce_op, str) and reduce_op.lower() in ("mean", "avg")
        if not (is_mean and isinstance(tensor, Tensor) and torch.distributed.is_initialized()):
            return super().reduce(tensor, group, reduce_op)  # type: ignore[safe-super]
        total = super().reduce(tensor, group, "sum")  # type: ignore[safe-super]
        return total.copy_(total / torch.distributed.get_world_size(group))


class NPUSingleDeviceStrategy(_OnNPU, SingleDeviceStrategy):
    """One NPU.

    Args:
        device: of the model; the trainer's ``devices`` overrule it.
        arguments: of ``SingleDeviceStrategy``.
    """

    strategy_name = f"{_PREFIX}single_device"

    def __init__(self, device: torch.device | str = f"{NAME}:0", **arguments: Any) -> None:
        load()  # torch knows the name from now on
        super().__init__(device, **arguments)

    @property
    def parallel_devices(self) -> list[torch.device]:
        """None yet: the trainer sets them where there are none."""
        return []

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device]) -> None:
        if len(devices) != 1:
            raise ValueError(
                f"strategy {self.strategy_name} is for one NPU, devices are {', '.join(map(str, devices))}: choose "
                "auto, ddp or fsdp2"
            )
        self._root_device = devices[0]


class NPUDDPStrategy(_ReducesBySum, DDPStrategy):
    """A copy of the model on each NPU, gradients averaged over HCCL; arguments as ``DDPStrategy``."""

    strategy_name = f"{_PREFIX}ddp"

    def __init__(self, process_group_backend: str = "hccl", **arguments: Any) -> None:
        super().__init__(process_group_backend=process_group_backend, **arguments)

    def _setup_model(self, model: torch.nn.Module) -> DistributedDataParallel:
        # Lightning's own opens a stream of CUDA.
        return DistributedDataParallel(model, self.determine_ddp_device_ids(), **self._ddp_kwargs)

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Make it known with and without parameters that a step may leave out."""
        strategy_registry.register(cls.strategy_name, cls, "copies on NPUs, over HCCL")
        name = f"{cls.strategy_name}_find_unused_parameters_true"
        strategy_registry.register(
            name, cls, "and steps may leave parameters out", find_unused_parameters=True
        )


class NPUFSDP2Strategy(_ReducesBySum, FSDP2Strategy):
    """Shards of the model, its gradients and the optimizer's state on the NPUs; arguments as ``FSDP2Strategy``."""

    strategy_name = f"{_PREFIX}fsdp2"

    def __init__(self, process_group_backend: str = "hccl", **arguments: Any) -> None:
        super().__init__(process_group_backend=process_group_backend, **arguments)

    def setup(self, trainer: Trainer) -> None:
        """Bring the sharded model to its device."""
        assert self.model is not None
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # HCCL has no average
        super().setup(trainer)


for _strategy in (NPUSingleDeviceStrategy, NPUDDPStrategy, NPUFSDP2Strategy):
    _strategy.register_strategies(StrategyRegistry)


def trainer_options(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``Trainer`` to change so that it computes on NPUs; none where it is to compute elsewhere.

    Lightning's own ``strategy: auto`` computes on the CPU with an accelerator that it doesn't know, and
    ``accelerator: auto`` never finds one.

    Args:
        trainer: arguments of ``Trainer``, or a configuration of them that is not instantiated yet.

    Raises:
        ImportError: NPUs are asked for and torch_npu is missing, or it is installed and CANN is missing.
        ValueError: NPUs are asked for that aren't there, or that can't do what is asked.
    """
    accelerator, strategy = trainer.get("accelerator", "auto"), trainer.get("strategy", "auto")
    if accelerator == "auto" and is_available():
        accelerator = NAME
    if accelerator != NAME and not isinstance(accelerator, NPUAccelerator):
        if isinstance(strategy, str) and strategy.startswith(_PREFIX):
            raise ValueError(
                f"strategy {strategy} is for accelerator npu, and accelerator is {accelerator}: set both"
            )
        return {}
    devices = NPUAccelerator.parse_devices(trainer.get("devices", "auto"))
    _check_precision(str(trainer.get("precision")))
    is_one = len(devices) == 1 and trainer.get("num_nodes", 1) == 1
    return {"accelerator": accelerator, "strategy": _strategy_of(strategy, is_one)}


def _strategy_of(given: Any, is_one: bool) -> Any:
    """A strategy of NPUs for what was asked for."""
    if not isinstance(given, str):
        if not issubclass(_class_of(given), _OnNPU):
            raise ValueError(
                f"strategy {_class_of(given).__name__} is not of NPUs: choose one of {', '.join(_names())}, or a class "
                f"of {__name__}"
            )
        return given
    if given == "auto":
        given = "single_device" if is_one else "ddp"
    name = given.removeprefix(_PREFIX)
    if name not in _names():
        raise ValueError(f"accelerator npu has no strategy {given!r}: choose auto, {', '.join(_names())}")
    if name == "single_device" and not is_one:
        raise ValueError("strategy single_device is for one NPU: choose auto, ddp or fsdp2, or devices 1")
    return _PREFIX + name


def _class_of(given: Any) -> type:
    """Of a strategy, or of the configuration of one."""
    if isinstance(given, Strategy):
        return type(given)
    return resolve_name(given["class_path"])


def _names() -> list[str]:
    return [name.removeprefix(_PREFIX) for name in StrategyRegistry if name.startswith(_PREFIX)]


def _check_precision(precision: str) -> None:
    if precision.startswith("64") or precision == "double":
        raise ValueError(f"precision {precision}: NPUs compute in fp32 instead; choose 32-true")
    if precision.startswith("bf16") and not load().is_bf16_supported():
        raise ValueError(f"precision {precision}: this NPU has no bfloat16; choose 16-mixed or 32-true")
