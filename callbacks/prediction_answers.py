"""Answers of ``illume predict`` with an MLLM as files."""

from collections.abc import Iterable
from typing import Any

import lightning as L

from illume_lightning.lit.answers import Answer
from illume_lightning.lit.conversation_data import JobBatch
from illume_lightning.lit.generation_job import report
from illume_lightning.lit.planned_data import replica


class PredictionAnswers(L.Callback):
    """Write answers to ``predictions`` in the run's folder as they come: the layout of ``illume generate``.

    Started again, the prediction does what is missing. If lines failed it ends with exit status 1.
    """

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Iterable[Answer],
        batch: JobBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take the answers of this device's lines, which makes the module work on them, and write them."""
        rank, world_size = replica(trainer)
        batch.folder.write(outputs, f"{rank + 1}-of-{world_size}", batch.lines, rank)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put everything together when all devices are done.

        Raises:
            SystemExit: if lines failed.
        """
        trainer.strategy.barrier()
        datamodule: Any = trainer.datamodule
        if trainer.is_global_zero and report(datamodule.answers, datamodule.answers.finish(datamodule.lines)):
            raise SystemExit(1)
