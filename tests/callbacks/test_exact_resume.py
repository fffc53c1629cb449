import random

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from callbacks.exact_resume import ExactResume

STEPS = 12


class Noisy(L.LightningModule):
    """Draws from every generator in training and in validation."""

    def __init__(self, validates: bool = True) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4))
        self.drawn: list[tuple] = []
        self.validated: list[int] = []

    def training_step(self, batch, batch_idx):
        noise = torch.randn(4)
        self.drawn.append((batch_idx, random.random(), float(np.random.rand()), float(noise.sum())))
        return (self.weight - torch.nn.functional.dropout(noise, 0.5) * self.drawn[-1][1]).square().sum()

    def validation_step(self, batch, batch_idx):
        self.validated.append(self.global_step)
        random.random(), np.random.rand(3), torch.randn(5)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)


def run(folder=None, ckpt_path=None, exact=True, validate_every=None, seed=0, callback=None):
    L.seed_everything(seed, verbose=False)
    callbacks: list[L.Callback] = [ExactResume()] if exact else []
    if callback is not None:
        callbacks.append(callback)
    if folder is not None:
        callbacks.append(ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1))
    trainer = L.Trainer(
        accelerator="cpu", max_steps=STEPS, max_epochs=-1, logger=False, callbacks=callbacks,
        enable_checkpointing=folder is not None, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0 if validate_every is None else 1.0, num_sanity_val_steps=2,
        val_check_interval=validate_every or 1.0, check_val_every_n_epoch=None if validate_every else 1,
    )  # fmt: skip
    module = Noisy()
    trainer.fit(
        module,
        DataLoader(torch.arange(STEPS)),
        DataLoader(torch.arange(3)),
        ckpt_path=ckpt_path,
        weights_only=True,
    )
    return module


@pytest.mark.parametrize("step", [1, 5, 6, 11])
@pytest.mark.parametrize("validate_every", [None, 3])
def test_a_resumed_run_draws_the_same_numbers(tmp_path, step, validate_every):
    whole = run(tmp_path, validate_every=validate_every)
    again = run(ckpt_path=tmp_path / f"step={step}.ckpt", validate_every=validate_every, seed=99)
    assert [drawn[1:] for drawn in again.drawn] == [drawn[1:] for drawn in whole.drawn[step:]]
    assert torch.equal(again.weight, whole.weight)


def test_without_the_callback_it_does_not(tmp_path):
    whole = run(tmp_path, exact=False)
    again = run(ckpt_path=tmp_path / "step=5.ckpt", exact=False)
    assert not torch.equal(again.weight, whole.weight)


def test_validation_does_not_touch_training():
    plain = run()
    assert run(validate_every=1).drawn == run(validate_every=4).drawn == plain.drawn
    assert run(validate_every=4, exact=False).drawn != plain.drawn


def test_a_validation_that_is_due_at_the_checkpoint_is_made(tmp_path):
    """It is written before."""
    whole = run(tmp_path, validate_every=3)
    sanity = [0, 0]
    assert whole.validated == sanity + [3] * 3 + [6] * 3 + [9] * 3 + [12] * 3
    for step, steps in ((5, (6, 9, 12)), (6, (6, 9, 12)), (7, (9, 12))):
        again = run(ckpt_path=tmp_path / f"step={step}.ckpt", validate_every=3)
        assert [s for s in again.validated if s] == [s for s in steps for _ in range(3)], step


class SaveAfterValidation(L.Callback):
    """Saves when validation has drawn its numbers and training goes on."""

    def __init__(self, folder) -> None:
        self.folder = folder

    def on_validation_end(self, trainer, pl_module) -> None:
        if not trainer.sanity_checking:
            trainer.save_checkpoint(self.folder / f"after{trainer.global_step}.ckpt")


def test_a_checkpoint_saved_after_validation_is_exact_too(tmp_path):
    whole = run(validate_every=3, callback=SaveAfterValidation(tmp_path))
    again = run(ckpt_path=tmp_path / "after6.ckpt", validate_every=3, seed=99)
    assert [step for step in again.validated if step] == [9] * 3 + [12] * 3
    assert [drawn[1:] for drawn in again.drawn] == [drawn[1:] for drawn in whole.drawn[6:]]
    assert torch.equal(again.weight, whole.weight)


def test_state_is_safe_to_load_and_complete(tmp_path):
    run(tmp_path)
    checkpoint = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    (state,) = checkpoint["callbacks"]["ExactResume"]["ranks"]
    assert {"python", "numpy", "torch"} <= state.keys()


def test_another_number_of_processes_is_reported(tmp_path, caplog):
    run(tmp_path)
    checkpoint = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    checkpoint["callbacks"]["ExactResume"]["ranks"] *= 2
    torch.save(checkpoint, tmp_path / "two.ckpt")
    assert len(run(ckpt_path=tmp_path / "two.ckpt").drawn) == STEPS - 3
    assert "the checkpoint is of 2 processes and there are 1" in caplog.text


class Accumulating(L.LightningModule):
    is_last_micro_batch = False


def test_within_a_training_step_its_beginning_is_saved():
    """To which a run goes back, as gradients are in no checkpoint."""
    callback, module, trainer = ExactResume(), Accumulating(), L.Trainer(barebones=True, accelerator="cpu")
    torch.manual_seed(1)
    states = []
    for is_last in (True, False, False, True):
        module.is_last_micro_batch = is_last
        callback.on_train_batch_start(trainer, module, None, 0)
        torch.rand(3)
        states.append(callback.state_dict()["ranks"][0]["torch"])  # of a checkpoint after an exception
        callback.on_train_batch_end(trainer, module, None, None, 0)
        states.append(callback.state_dict()["ranks"][0]["torch"])
    now = torch.get_rng_state()
    torch.manual_seed(1)
    beginning = torch.get_rng_state()
    torch.rand(3)
    second = torch.get_rng_state()
    assert all(torch.equal(state, beginning) for state in states[:1])
    assert all(torch.equal(state, second) for state in states[1:7])
    assert torch.equal(states[7], now)
