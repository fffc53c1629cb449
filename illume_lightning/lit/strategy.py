"""Whether devices, strategy, precision and batch sizes go together, before anything is built."""

from collections.abc import Iterable, Mapping, Sequence
from pkgutil import resolve_name
from typing import Any

import lightning as L
import torch
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    StrategyRegistry,
)
from lightning.pytorch.trainer.connectors.accelerator_connector import _select_auto_accelerator

from illume_lightning.data.schedule import Phase, Schedule
from illume_lightning.lit.npu_strategies import trainer_options
from illume_lightning.lit.sharding import FSDP2Strategy
from illume_lightning.lit.speed_options import check_speed_options

STRATEGIES = ("auto", "ddp", "fsdp2", "fsdp2_sharded")
"""Those to choose from; plain DDP's variants are accepted too."""

_FP16 = ("16-mixed", "16-true", "16", 16)
_BF16 = ("bf16-mixed", "bf16-true", "bf16")
_HALF_WEIGHTS = ("16-true", "bf16-true")


def check_trainer_options(
    trainer: Mapping[str, Any],
    phases: Sequence[Phase] = (),
    model: Mapping[str, Any] | None = None,
    command: str = "fit",
) -> int:
    """Refuse what would fail, hang or train something else than it says, minutes later or on every device.

    Args:
        trainer: options of ``trainer``; what they leave out has Lightning's default.
        phases: of the curriculum.
        model: ``class_path`` and ``init_args`` of the LightningModule.
        command: fit, validate, test or predict.

    Returns:
        Processes of the whole run, one for each device of each machine.

    Raises:
        ValueError: names what was given and what would do.
        ImportError: if the accelerator needs a package that is missing.
    """
    accelerator = _accelerator(trainer.get("accelerator", "auto"))
    num_nodes = trainer.get("num_nodes", 1)
    if num_nodes < 1:
        raise ValueError(f"trainer.num_nodes is {num_nodes}: give the number of machines, at least 1")
    processes = num_nodes * _num_devices(accelerator, trainer.get("devices", "auto"))
    given = trainer.get("strategy", "auto")
    kind, options = _strategy(given)
    name = given if isinstance(given, str) else kind.__name__
    _check_strategy(name, kind, options, accelerator, processes)
    _check_precision(trainer.get("precision"), accelerator, kind)
    callbacks = trainer.get("callbacks") or []
    check_half_weights(trainer.get("precision"), callbacks, command)
    if trainer.get("sync_batchnorm") and accelerator != "cuda":
        raise ValueError(
            f"trainer.sync_batchnorm needs CUDA, the accelerator is {accelerator}: leave it out; DualViTok's "
            "discriminator counts over all devices without it"
        )
    if issubclass(kind, ModelParallelStrategy):
        _check_sharding(name, model or {}, callbacks, command)
    if command == "fit":
        for phase in phases:
            phase.accumulation(processes)
    return processes


def check_config(config: Any, command: str) -> int:
    """``check_trainer_options`` of a parsed command, where nothing is built yet.

    Args:
        config: of LightningCLI's subcommand, with ``trainer``, ``model`` and ``curriculum``.
        command: the subcommand.

    Returns:
        Processes of the whole run.

    Raises:
        ValueError: as ``check_trainer_options``, ``check_speed_options``, ``Schedule`` and
            ``npu_strategies.trainer_options``.
        ImportError: as they.
    """
    options = vars(config["trainer"]) | trainer_options(config["trainer"])
    schedule = Schedule([Phase(**vars(phase)) for phase in config["curriculum"]["phases"]])
    processes = check_trainer_options(options, schedule.phases, config["model"], command)
    check_speed_options(_accelerator(options.get("accelerator", "auto")), config["model"])
    return processes


def check_half_weights(precision: Any, callbacks: Iterable[Any], command: str) -> None:
    """Refuse what weights in half precision make no sense for.

    Args:
        precision: ``trainer.precision``.
        callbacks: of the trainer.
        command: as ``check_trainer_options``.

    Raises:
        ValueError: says what would do.
    """
    if precision not in _HALF_WEIGHTS or command != "fit":
        return
    if precision == "16-true":
        raise ValueError(
            "trainer.precision 16-true can't train: in float16 squares of gradients are zero, and Adam divides by "
            "them: use 16-mixed or bf16-true"
        )
    for path in filter(None, map(_class_path, callbacks)):
        if issubclass(resolve_name(path), WeightAveraging):
            raise ValueError(
                f"the callback {path} keeps an average in fp32, which every validation would round to the bfloat16 of "
                f"trainer.precision {precision}: leave it out, or use bf16-mixed"
            )


def _accelerator(given: Any) -> str:
    """Name of the accelerator, where it is one of Lightning's or ours."""
    if not isinstance(given, str):
        return type(given).__name__
    if given == "auto":
        return _select_auto_accelerator()
    names = sorted(AcceleratorRegistry.available_accelerators())
    if given not in (*names, "gpu"):
        raise ValueError(f"trainer.accelerator is {given!r}: choose auto, gpu, {', '.join(names)}")
    if given == "gpu":
        given = "mps" if AcceleratorRegistry["mps"]["accelerator"].is_available() else "cuda"
    AcceleratorRegistry.get(given)  # says which package is missing
    if given in ("cuda", "mps") and not AcceleratorRegistry[given]["accelerator"].is_available():
        raise ValueError(
            f"trainer.accelerator is {given!r}, and there is no such device here, or torch was built without it: "
            "use cpu, or see `illume doctor`"
        )
    return given


def _num_devices(accelerator: str, devices: Any) -> int:
    """Devices of one machine."""
    if accelerator not in AcceleratorRegistry:  # an object that knows its devices itself
        return (
            len(devices) if isinstance(devices, list) else max(1, devices if isinstance(devices, int) else 1)
        )
    there = AcceleratorRegistry[accelerator]["accelerator"].auto_device_count()
    if isinstance(devices, str) and devices != "auto":
        parts = [part.strip() for part in devices.split(",") if part.strip()]
        if not all(part.lstrip("-").isdigit() for part in parts) or not parts:
            raise ValueError(f"trainer.devices is {devices!r}: give a number, a list such as [0, 1], or auto")
        devices = [int(part) for part in parts] if "," in devices else int(parts[0])
    if accelerator == "cpu" and (devices == -1 or isinstance(devices, list)):
        raise ValueError(f"trainer.devices is {devices}: on a CPU give a number of processes")
    if devices in ("auto", -1):
        return there
    wrong = devices == [] or devices == 0 or (isinstance(devices, int) and devices < 0)
    if wrong or (isinstance(devices, list) and (min(devices) < 0 or len(set(devices)) < len(devices))):
        raise ValueError(f"trainer.devices is {devices}: give a positive number, or distinct numbers from 0")
    most = max(devices) + 1 if isinstance(devices, list) else devices
    if accelerator != "cpu" and most > there:
        raise ValueError(
            f"trainer.devices is {devices}, and this machine has {there} of {accelerator}, numbered from 0: use "
            f"{there} or less, and trainer.num_nodes for more machines"
        )
    return len(devices) if isinstance(devices, list) else devices


def _strategy(given: Any) -> tuple[type, Mapping[str, Any]]:
    """Class and options of a strategy; ``auto`` stands for DDP, which Lightning leaves out on one device."""
    if given == "auto":
        return DDPStrategy, {}
    if isinstance(given, str):
        if given not in StrategyRegistry:
            raise ValueError(f"trainer.strategy is {given!r}: choose {', '.join(STRATEGIES)}")
        return StrategyRegistry[given]["strategy"], StrategyRegistry[given]["init_params"]
    if (path := _class_path(given)) is None:
        return type(given), {}
    return resolve_name(path), given.get("init_args") or {}


def _check_strategy(
    name: str, kind: type, options: Mapping[str, Any], accelerator: str, processes: int
) -> None:
    if issubclass(kind, DDPStrategy) and options.get("start_method", "popen") != "popen":
        raise ValueError(
            f"trainer.strategy {name} starts processes from within the run, which then loses what it learned: use ddp"
        )
    if issubclass(kind, FSDPStrategy):
        raise ValueError(f"trainer.strategy {name} is FSDP's first version: use fsdp2")
    if issubclass(kind, SingleDeviceStrategy) and processes > 1:
        raise ValueError(
            f"trainer.strategy {name} is for one device, and there are {processes}: use ddp or fsdp2"
        )
    if issubclass(kind, ModelParallelStrategy) and not issubclass(kind, FSDP2Strategy):
        sizes = [options.get(f"{dimension}_parallel_size", "auto") for dimension in ("data", "tensor")]
        if processes > 1 and sizes != [processes, 1]:
            raise ValueError(
                f"trainer.strategy {name} has data_parallel_size {sizes[0]} and tensor_parallel_size {sizes[1]}, and "
                f"models here have no tensor parallelism: use fsdp2, or {processes} and 1"
            )


def _check_precision(precision: Any, accelerator: str, kind: type) -> None:
    if precision in _FP16 and accelerator == "cpu":
        raise ValueError(f"trainer.precision {precision} is not for CPUs: use bf16-mixed or 32-true")
    if precision in ("16-mixed", "16", 16) and issubclass(kind, ModelParallelStrategy):
        raise ValueError(
            f"trainer.precision {precision} scales losses, which FSDP2 does not support: use bf16-mixed or 32-true"
        )
    if precision in _BF16 and accelerator == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise ValueError(
            f"trainer.precision {precision} is not for {torch.cuda.get_device_name()}, which has no bfloat16: use "
            "16-mixed or 32-true"
        )


def _check_sharding(name: str, model: Mapping[str, Any], callbacks: Iterable[Any], command: str) -> None:
    """FSDP2: what needs the weights in one piece."""
    if command == "predict":
        raise ValueError(
            f"trainer.strategy {name} is for training: predict with ddp, on one device, or `illume generate`"
        )
    kind = resolve_name(model["class_path"]) if "class_path" in model else None
    if kind is not None and kind.configure_model is L.LightningModule.configure_model:
        raise ValueError(
            f"{kind.__name__} is not to be shared out by trainer.strategy {name}, which is for the MLLM's stages and "
            "the diffusion decoder: use ddp"
        )
    if (model.get("init_args") or {}).get("matrix_optimizer") is not None:
        raise ValueError(
            f"model.matrix_optimizer needs whole matrices, and trainer.strategy {name} gives each device a part: use "
            "ddp, or leave it out"
        )
    if (model.get("init_args") or {}).get("channels_last"):
        raise ValueError(
            f"model.channels_last is not for trainer.strategy {name}, which cuts weights in their usual order: leave "
            "it out, or use ddp"
        )
    for path in filter(None, map(_class_path, callbacks)):
        if path.endswith(".GenerationScores") or issubclass(resolve_name(path), WeightAveraging):
            raise ValueError(
                f"the callback {path} needs the whole model on each device, and trainer.strategy {name} gives each a "
                "part: leave it out, or use ddp"
            )


def _class_path(value: Any) -> str | None:
    """Of a class in a configuration."""
    return value.get("class_path") if hasattr(value, "get") else None
