"""The model that a run's YAML describes, on tensors without values; no data and no weights are read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from jsonargparse import ArgumentParser
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from illume_lightning.budget.dry_step import PRECISIONS, Precision, default_type
from illume_lightning.data.schedule import Phase, Schedule
from illume_lightning.lit.class_paths import restrict
from illume_lightning.lit.cli import IllumeCLI
from illume_lightning.lit.mllm import MLLMStage
from illume_lightning.lit.strategy import check_half_weights, check_trainer_options
from illume_lightning.lit.training import TrainingModule
from illume_lightning.nn.checkpoints import build_official
from illume_lightning.nn.dualvitok import DualViTok

DEFAULT_PRECISION = "bf16-mixed"
"""Where the YAML names none, as the overlays in experiments/hardware do."""

_TOKENIZER_FILE = "dualvitok.yaml"


@dataclass(frozen=True)
class RunModel:
    """What there is to know of a run without its data."""

    module: TrainingModule
    """Its parameters and buffers have shapes and no values."""

    fake: FakeTensorMode
    """What made them so."""

    schedule: Schedule
    """Of the curriculum."""

    data: dict[str, Any]
    """``init_args`` of its datamodule."""

    precision_name: str
    """As Lightning calls it."""

    averages: bool
    """Whether a callback keeps an average of all weights (EMA)."""

    @property
    def precision(self) -> Precision:
        """Types of weights and products."""
        return PRECISIONS[self.precision_name]


class _ParseOnly(IllumeCLI):
    """Stops before anything is built."""

    def instantiate_classes(self, *args: Any, **options: Any) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass

    def _set_seed(self) -> None:
        pass


def read_run(
    files: Sequence[str], curriculum: type[L.Callback], devices: int = 1, strategy: str = "ddp"
) -> RunModel:
    """Parse a run's files as ``illume fit`` does, and build its model.

    Args:
        files: YAML; later ones override earlier ones.
        curriculum: the callback that owns the phases.
        devices: that it is to train on.
        strategy: ddp or fsdp2.

    Raises:
        ArgumentError: a key or value is wrong.
        FileNotFoundError: if there is no such file.
        ValueError: if it is no run, its precision can't be planned, or devices, strategy and run don't go together.
    """
    config = _parse(files, curriculum)
    name = str(config["trainer"]["precision"] or DEFAULT_PRECISION)
    if name not in PRECISIONS:
        raise ValueError(
            f"trainer.precision {name!r} can't be planned: choose one of {', '.join(PRECISIONS)}"
        )
    schedule = Schedule([Phase(**phase) for phase in config["curriculum"]["phases"]])
    callbacks = config["trainer"]["callbacks"] or []
    check_half_weights(name, callbacks, "fit")
    # On the CPU, where any number of devices is there.
    asked = {"accelerator": "cpu", "devices": devices, "strategy": strategy, "callbacks": callbacks}
    check_trainer_options(asked, schedule.phases, config["model"])
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with default_type(PRECISIONS[name].weights):
        with fake:
            module = _build(config["model"], L.LightningModule)
        if not isinstance(module, TrainingModule):
            raise ValueError(
                f"{config['model']['class_path']} can't be planned: its training_step is not a TrainingModule's"
            )
        configure(module, fake)
    if getattr(module, "tokenizer_path", None):
        with fake:  # fixed networks stay in fp32
            module.fixed["tokenizer"] = _tokenizer(Path(files[0]).with_name(_TOKENIZER_FILE))
    if isinstance(module, MLLMStage):
        trunk = module.model.trunk
        if trunk.config._attn_implementation == "flash_attention_2":
            trunk.set_attn_implementation("sdpa")  # its kernel can't run without values
    return RunModel(
        module,
        fake,
        schedule,
        config["data"]["init_args"],
        name,
        any(callback["class_path"].endswith("WeightAveraging") for callback in callbacks),
    )


def configure(module: L.LightningModule, fake: FakeTensorMode) -> None:
    """Call ``configure_model``; what it adds has no values either."""
    with torch.device("meta"):
        module.configure_model()
    for network in module.modules():
        for name, parameter in network.named_parameters(recurse=False):
            if parameter.device.type == "meta":  # peft leaves new matrices there
                with fake:
                    value = torch.empty_like(parameter, device="cpu")
                setattr(network, name, nn.Parameter(value, parameter.requires_grad))


def _parse(files: Sequence[str], curriculum: type[L.Callback]) -> dict[str, Any]:
    for file in files:
        if not Path(file).is_file():
            raise FileNotFoundError(
                f"no file {file}: give the YAML of a run, such as experiments/paper/dualvitok.yaml"
            )
        if "model" not in (sections := yaml.safe_load(Path(file).read_text()) or {}) and file == files[0]:
            raise ValueError(
                f"{file} has no model, only {', '.join(sections) or 'nothing'}: give the YAML of a run first"
            )
    words = [word for file in files for word in ("-c", file)]
    cli = _ParseOnly.run(["fit", *words], curriculum)
    return yaml.safe_load(cli.parser.dump(cli.config, skip_link_targets=False, skip_none=False))["fit"]


def _build(section: dict[str, Any], kind: type) -> Any:
    restrict()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, "part")
    return parser.instantiate(parser.parse_object({"part": _without_files(section)})).part


def _tokenizer(file: Path) -> DualViTok:
    """That of the file, or else the published one's sizes."""
    if file.is_file():
        section = yaml.safe_load(file.read_text())["model"]["init_args"]["model"]
        tokenizer = _build(section, DualViTok)
    else:
        tokenizer = build_official()
    return tokenizer.requires_grad_(False).eval()


def _without_files(section: Any) -> Any:
    """The same model with published parts of the same sizes instead of those that are read from somewhere."""
    if isinstance(section, list):
        return [_without_files(value) for value in section]
    if not isinstance(section, dict):
        return section
    section = {key: _without_files(value) for key, value in section.items()}
    options = section.get("init_args") or {}
    match str(section.get("class_path", "")).rpartition(".")[2]:
        case "QwenVisionTower":
            options["pretrained"] = None
        case "sdxl_unet":
            section["class_path"] = "illume_lightning.nn.diffusion_decoder.build_unet"
            del options["pretrained"]
        case "VAELatents":
            section = {"class_path": "illume_lightning.budget.published.sdxl_latents"}
        case "Perceptual":
            section = {"class_path": "illume_lightning.budget.published.UntrainedPerceptual"}
    options.pop("fid_features", None)  # only validation has it
    if options.get("compile"):
        options["compile"] = False
    return section
