"""A run's end is saved, whatever the interval; one file has two names, and the one before it is kept."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.utils.data import DataLoader

from callbacks import Checkpoint
from illume_lightning.lit.durable_checkpoints import BackgroundCheckpointIO, DurableCheckpointIO
from illume_lightning.nn.whole_checkpoint import choose, damage


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


def fit(folder, max_steps, every, manual, *callbacks, keep=-1, plugin=DurableCheckpointIO, resumed=None):
    checkpoint = Checkpoint(folder, "{step}", every_n_train_steps=every, save_top_k=keep, save_last=True)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        max_epochs=-1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[checkpoint, *callbacks],
        plugins=[plugin()] if plugin else [],
    )
    module = Counter(manual)
    trainer.fit(module, DataLoader(torch.zeros(64), batch_size=1), ckpt_path=resumed)
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


class Look(L.Callback):
    """What is there after every step."""

    def __init__(self, folder):
        self.folder, self.good = folder, []

    def on_train_batch_end(self, trainer, *_):
        self.good.append(sorted(path.name for path in self.folder.glob("*.ckpt") if not damage(path)))


@pytest.mark.parametrize("plugin", [DurableCheckpointIO, BackgroundCheckpointIO, None])
def test_the_newest_two_are_kept_and_the_last_is_one_of_them(tmp_path, plugin):
    saved = fit(tmp_path, 7, 2, False, keep=1, plugin=plugin)
    assert saved == {"step=6": (6, 6.0), "step=7": (7, 7.0), "last": (7, 7.0)}
    is_one = (tmp_path / "last.ckpt").samefile(tmp_path / "step=7.ckpt")
    assert is_one == (plugin is not None), "who writes otherwise than we do may mean something else by a file"
    assert len(list(tmp_path.glob("*.sha256"))) == (3 if plugin else 0)


def test_there_is_always_a_whole_one(tmp_path):
    look = Look(tmp_path)
    fit(tmp_path, 6, 2, True, look, keep=1)
    # Lightning calls checkpoints last, so that a step sees what the one before it left.
    assert look.good == [
        *([], []),
        *[["last.ckpt", "step=2.ckpt"]] * 2,
        *[["last.ckpt", "step=2.ckpt", "step=4.ckpt"]] * 2,
    ]


def test_a_resumed_run_keeps_as_many(tmp_path):
    fit(tmp_path, 4, 1, True, keep=1)
    saved = fit(tmp_path, 6, 1, True, keep=1, resumed=tmp_path / "last.ckpt")
    assert sorted(saved) == ["last", "step=5", "step=6"] and saved["last"] == (6, 6.0)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    (own,) = (value for key, value in state.items() if key.startswith("Checkpoint"))
    assert own["last_model_path"] == str(tmp_path / "last.ckpt")
    assert own["best_model_path"] == str(tmp_path / "step=6.ckpt")


def test_after_a_damaged_one_the_same_steps_have_the_same_names(tmp_path):
    fit(tmp_path, 4, 1, True, keep=1)
    for name in ("last.ckpt", "step=4.ckpt"):
        (tmp_path / name).unlink()
    good = choose(tmp_path).checkpoint
    assert good == tmp_path / "step=3.ckpt"
    saved = fit(tmp_path, 6, 1, True, keep=1, resumed=good)
    assert saved["last"] == (6, 6.0) and {"step=5", "step=6"} < saved.keys()
    assert not [name for name in saved if "-v" in name]


def test_last_is_always_called_last(tmp_path):
    """A checkpoint of another folder knows nothing of the files here."""
    fit(tmp_path / "one", 3, 1, True)
    fit(tmp_path / "two", 2, 1, True)
    saved = fit(tmp_path / "two", 5, 1, True, resumed=tmp_path / "one" / "last.ckpt")
    assert saved["last"] == (5, 5.0) and "last-v1" not in saved
