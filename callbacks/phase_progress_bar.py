"""A progress bar that says where in the curriculum a run is."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar

from callbacks.resolution_curriculum import ResolutionCurriculum


class PhaseProgressBar(TQDMProgressBar):
    """Lightning's progress bar with the phase, size mode and side in front.

    Args:
        refresh_rate: micro-batches between two updates.
    """

    def __init__(self, refresh_rate: int = 10) -> None:
        super().__init__(refresh_rate=refresh_rate)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """What modules log for the bar, under short names."""
        metrics = super().get_metrics(trainer, pl_module)
        hidden = ("v_num", "curriculum/phase")
        return {name.removeprefix("train/"): v for name, v in metrics.items() if name not in hidden}

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Name the phase of this step."""
        for callback in trainer.callbacks:
            if isinstance(callback, ResolutionCurriculum):
                schedule, phase = callback.schedule, callback.phase_at(trainer.global_step)
                number = schedule.phase_index(trainer.global_step) + 1
                self.train_progress_bar.set_description(
                    f"phase {number}/{len(schedule.phases)} {phase.mode} {phase.side} px", refresh=False
                )
