"""`python stopped_run.py FOLDER MAX_STEPS SECONDS`: a run in steps of two batches, of which step 2 takes a while."""

import sys
import time
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader

from callbacks import Checkpoint
from illume_lightning.lit.durable_checkpoints import DurableCheckpointIO, choose


class Counter(L.LightningModule):
    """Its weight is the number of steps."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        sys.stdout.write(f"batch {batch_idx} of step {self.global_step}\n")
        sys.stdout.flush()
        if self.global_step == 2:
            time.sleep(self.seconds / 2)
        return -self.weight

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def fit(folder: Path, max_steps: int, seconds: float = 0.0, **options: object) -> L.Trainer:
    """Go on from what is there; saved every 100 steps."""
    checkpoint = Checkpoint(folder, "{step}", every_n_train_steps=100, save_top_k=1, save_last=True)
    given = {"plugins": [DurableCheckpointIO()], "callbacks": [checkpoint], "accelerator": "cpu"}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        **(given | quiet | options), max_steps=max_steps, max_epochs=-1, accumulate_grad_batches=2
    )
    data = DataLoader(torch.zeros(64), batch_size=1)
    trainer.fit(Counter(seconds), data, ckpt_path=choose(folder).checkpoint)
    return trainer


if __name__ == "__main__":
    fit(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
