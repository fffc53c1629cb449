"""The runs of a schedule with what each of them left behind."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from illume_lightning.report.metrics import Metrics, read_metrics
from illume_lightning.report.run_records import RunRow, read_run_row
from illume_lightning.report.schedule_state import ScheduleState, Step
from illume_lightning.report.scores import SCORES, Scores, read_scores
from illume_lightning.run_json import RUN_JSON

PART_OF_MODULE = {
    "VisionEncoderModule": "vision_encoder",
    "DualViTokModule": "dualvitok",
    "DiffusionDecoderModule": "diffusion_decoder",
    "MLLMStage1": "mllm_stage1",
    "MLLMStage2": "mllm_stage2",
    "MLLMStage3": "mllm_stage3",
}
TITLES = {
    "vision_encoder": "Vision encoder",
    "dualvitok": "DualViTok",
    "diffusion_decoder": "Diffusion decoder",
    "mllm_stage1": "MLLM, stage 1",
    "mllm_stage2": "MLLM, stage 2",
    "mllm_stage3": "MLLM, stage 3",
}


@dataclass(frozen=True)
class Gap:
    """Something that is not there, and the command that makes it."""

    text: str
    command: str = ""


@dataclass(frozen=True)
class Run:
    """One training run of the schedule; its folder need not be there yet."""

    step: Step
    folder: Path
    part: str
    config_text: str
    """``config.yaml``; empty if there is none."""

    config: dict[str, Any]
    metrics: Metrics
    scores: Scores | None
    scores_gap: Gap | None
    """Why there are no scores."""

    record: RunRow | None
    record_gap: Gap | None
    """Why there is no record of it."""

    @property
    def title(self) -> str:
        """Name of the part, for people."""
        return TITLES.get(self.part, self.part)

    @property
    def is_mllm(self) -> bool:
        """Whether it is one of the MLLM's stages."""
        return self.part.startswith("mllm")

    @property
    def gap(self) -> Gap | None:
        """Why there is nothing to see of it at all."""
        if self.metrics.series:
            return None
        return Gap(f"{self.title} has not been trained yet.", self.step.shown)


def read_runs(state: ScheduleState) -> list[Run]:
    """The runs that the schedule's steps train, in its order."""
    return [_read_run(state, step) for step in state.steps if step.is_fit]


def _read_run(state: ScheduleState, step: Step) -> Run:
    folder = state.path(step.output)
    text, config = _read_config(folder / "config.yaml")
    evaluations = [
        other for other in state.steps if "evaluate" in other.command and step.output in other.command
    ]
    command = evaluations[0].shown if evaluations else f"illume evaluate {shlex.quote(step.output)}"
    scored = [state.path(other.output) for other in evaluations]
    found = next((path for path in scored if (path / SCORES).is_file()), folder / "scores")
    scores, gap = None, None
    try:
        scores = read_scores(found, f"`{command}`")
    except FileNotFoundError:
        gap = Gap(f"{step.output} has not been evaluated.", command)
    except ValueError as error:
        gap = Gap(f"{error}.", command)
    part = _part(config) or (folder.parent.name if folder.name.startswith("seed") else folder.name)
    record = _read_record(folder, step)
    return Run(step, folder, part, text, config, read_metrics(folder), scores, gap, *record)


def _read_record(folder: Path, step: Step) -> tuple[RunRow | None, Gap | None]:
    try:
        return read_run_row(folder), None
    except FileNotFoundError:
        return None, Gap(
            f"{step.output} has no {RUN_JSON}: it is yet to be trained, or an earlier version did."
        )
    except ValueError as error:
        return None, Gap(f"{step.output}: {error}.")


def _read_config(path: Path) -> tuple[str, dict[str, Any]]:
    if not path.is_file():
        return "", {}
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError:
        return text, {}
    return text, config if isinstance(config, dict) else {}


def _part(config: dict[str, Any]) -> str | None:
    model = config.get("model")
    name = model.get("class_path") if isinstance(model, dict) else None
    return PART_OF_MODULE.get(str(name).rpartition(".")[2])
