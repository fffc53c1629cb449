"""Build what an experiment's YAML describes, without running it."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from jsonargparse import ArgumentParser

from callbacks import ResolutionCurriculum
from illume_lightning.lit.cli import IllumeCLI

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


class ParseOnly(IllumeCLI):
    """Stops before anything is built."""

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def parse(*names: str, flags: tuple[str, ...] = ()) -> dict[str, Any]:
    """The resolved configuration of YAML files below ``experiments``, in order, and flags."""
    files = [word for name in names for word in ("-c", str(EXPERIMENTS / name))]
    cli = ParseOnly.run(["fit", *files, *flags], ResolutionCurriculum)
    return yaml.safe_load(cli.parser.dump(cli.config, skip_link_targets=False, skip_none=False))["fit"]


def build_model(config: dict[str, Any], device: str = "meta") -> L.LightningModule:
    """The LightningModule of a configuration; a vision tower's download is left out."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.LightningModule, "model")
    model = config["model"]["init_args"].get("model", {})
    encoder = model.get("init_args", {}).get("semantic_encoder")
    if encoder is not None:
        encoder["init_args"]["model"]["init_args"]["pretrained"] = None
    parsed = parser.parse_object({"model": config["model"]})
    with torch.device(device):
        return parser.instantiate_classes(parsed).model
