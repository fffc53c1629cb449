"""A trainer for models small enough for a test."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks import ExactResume, ResolutionCurriculum
from illume_lightning.data.schedule import Phase


def trainer_for(
    folder: Path | None, phases: list[Phase], *callbacks: L.Callback, **options: Any
) -> L.Trainer:
    """On one CPU, quiet, and the same every time; ``options``: of Lightning's Trainer, instead of these."""
    given: dict[str, Any] = {
        "accelerator": "cpu",
        "max_steps": phases[-1].until_step,
        "max_epochs": -1,
        "default_root_dir": folder,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "use_distributed_sampler": False,
        "deterministic": True,
        "callbacks": [ResolutionCurriculum(phases), ExactResume(), *callbacks],
    }
    return L.Trainer(**(given | options))
