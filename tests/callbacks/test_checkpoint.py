"""A run's end is saved, whatever the interval."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.utils.data import DataLoader

from callbacks import Checkpoint


class Counter(L.LightningModule):
    """Its weight is the number of steps, by manual or automatic optimisation."""

    def __init__(self, manual: bool) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        if self.automatic_optimization:
            return -self.weight
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(-self.weight)
        optimizer.step()
        return None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def fit(folder, max_steps, every, manual, *callbacks):
    checkpoint = Checkpoint(folder, "{step}", every_n_train_steps=every, save_top_k=-1, save_last=True)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        max_epochs=-1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[checkpoint, *callbacks],
    )
    module = Counter(manual)
    trainer.fit(module, DataLoader(torch.zeros(64), batch_size=1))
    saved = {path.stem: torch.load(path, weights_only=True) for path in folder.glob("*.ckpt")}
    return {
        name: (content["global_step"], float(content["state_dict"]["weight"]))
        for name, content in saved.items()
    }


@pytest.mark.parametrize("manual", [True, False])
def test_the_last_step_is_saved(tmp_path, manual):
    saved = fit(tmp_path, 7, 3, manual)
    assert saved == {"step=3": (3, 3.0), "step=6": (6, 6.0), "step=7": (7, 7.0), "last": (7, 7.0)}


def test_once_where_the_interval_fits(tmp_path):
    assert fit(tmp_path, 6, 3, True) == {"step=3": (3, 3.0), "step=6": (6, 6.0), "last": (6, 6.0)}


def test_the_end_of_a_run_with_averaged_weights_keeps_the_raw_ones(tmp_path):
    saved = fit(tmp_path, 5, 2, True, EMAWeightAveraging(decay=0.5))
    assert saved["last"][0] == 5 and 4.0 < saved["last"][1] < 5.0
    raw = torch.load(tmp_path / "last.ckpt", weights_only=True)["current_model_state"]
    assert float(next(value for key, value in raw.items() if key.endswith("weight"))) == 5.0
