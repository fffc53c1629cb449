"""A run of two processes in which something goes wrong: `python failing_run.py WHAT`."""

import os
import signal
import sys
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from illume_lightning.lit.training import TrainingModule

WHAT = sys.argv[1]


class Fragile(TrainingModule):
    """Its gradients are exchanged in every step, so each process waits for the other."""

    def __init__(self) -> None:
        super().__init__(0.0)
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        rank = self.trainer.global_rank
        if batch_idx == 2 and WHAT.split() == ["raise", str(rank)]:
            raise ValueError(f"the sample of process {rank} is spoilt")
        if batch_idx == 2 and WHAT.split() == ["kill", str(rank)]:
            os.kill(os.getpid(), signal.SIGKILL)
        self.descend(self.layer(batch).mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(L.LightningDataModule):
    def setup(self, stage: str) -> None:
        if WHAT == "setup" and self.trainer.global_rank == 1:
            raise FileNotFoundError("process 1 finds no store")

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.ones(100, 1))


if __name__ == "__main__":
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=20,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    sys.stderr.write(f"process {os.getpid()}\n")
    trainer.fit(Fragile(), Data())
