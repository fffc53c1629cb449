"""Alarms: raised once for each event, with numbers and a way out, and not by healthy runs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from tiny import build_tiny
from tiny_trainer import trainer_for

from callbacks import CodebookAlarm, GANAlarm, Rollback
from callbacks.collapse_alarm import Collapse
from illume_lightning.data.schedule import Phase
from illume_lightning.lit.datamodule import ImageDataModule, Source
from illume_lightning.lit.dualvitok import DualViTokModule
from illume_lightning.nn.discriminator import PatchDiscriminator
from illume_lightning.nn.losses import DualViTokLoss

HEALTHY = {"train/discriminator_loss": 0.45, "train/real_logits": 0.2, "train/fake_logits": -0.1}


class FakeRun:
    """Training steps of which only the values are real."""

    def __init__(self, alarm: L.Callback) -> None:
        self.alarm = alarm
        self.logged: dict[str, float] = {}
        self.usage: dict[str, Any] = {}
        strategy = SimpleNamespace(reduce=lambda tensor, reduce_op: tensor)
        self.trainer: Any = SimpleNamespace(global_step=0, is_global_zero=True, strategy=strategy)

    def steps(self, count: int, values: dict[str, float] | None = None) -> None:
        for _ in range(count):
            self.trainer.global_step += 1
            module: Any = SimpleNamespace(
                is_last_micro_batch=True,
                sentinel=SimpleNamespace(step=self.trainer.global_step - 1, values=values or {}),
                loss=SimpleNamespace(adversarial_weight=0.5),
                codebook_usage=self.usage,
                log=self.logged.__setitem__,
            )
            self.alarm.on_train_batch_end(self.trainer, module, None, None, 0)


@pytest.mark.parametrize(
    ("name", "wrong", "words"),
    [
        ("discriminator_won", {"train/discriminator_loss": 0.02, "train/real_logits": 3.0}, "hinge loss"),
        ("discriminator_dead", {"train/real_logits": 0.1, "train/fake_logits": 0.1}, "adversarial_start"),
        ("logits", {"train/real_logits": 500.0}, "above 100"),
        ("adaptive_weight", {"train/adaptive_weight": 9000.0}, "9e+03"),
    ],
)
def test_one_warning_for_each_event(name: str, wrong: dict[str, float], words: str, caplog: Any) -> None:
    run = FakeRun(GANAlarm(patience=5))
    run.steps(20, HEALTHY)
    run.steps(4, HEALTHY | wrong)
    run.steps(1, HEALTHY)
    assert not caplog.records and not run.logged
    run.steps(10, HEALTHY | wrong)
    (record,) = caplog.records
    assert words in record.getMessage() and f"{name} at training step 30" in record.getMessage()
    assert run.logged == {f"alarm/{name}": 1}
    run.steps(1, HEALTHY)
    run.steps(5, HEALTHY | wrong)
    assert len(caplog.records) == 2 and run.logged == {f"alarm/{name}": 2}


def test_a_resumed_run_does_not_warn_again(caplog: Any) -> None:
    run = FakeRun(GANAlarm(patience=5))
    run.steps(7, HEALTHY | {"train/real_logits": 500.0})
    again = GANAlarm(patience=5)
    again.load_state_dict(run.alarm.state_dict())
    caplog.clear()
    run = FakeRun(again)
    run.steps(9, HEALTHY | {"train/real_logits": 500.0})
    assert not caplog.records and run.logged == {"alarm/logits": 1}


def test_steps_without_an_adversary_are_not_judged(caplog: Any) -> None:
    run = FakeRun(GANAlarm(patience=2))
    run.steps(9, {"train/loss": 0.1})
    assert not caplog.records


@pytest.mark.parametrize(
    ("counts", "raised"),
    [
        (torch.full((100,), 50), 0),
        (torch.tensor([500] * 31 + [0] * 69), 0),
        (torch.tensor([500] * 29 + [0] * 71), 1),
        (torch.tensor([100_000] + [1] * 99), 1),  # all are in use, and one does the work
        (torch.tensor([900] + [0] * 99), 0),  # too few to tell
    ],
)
def test_codebooks(counts: torch.Tensor, raised: int, caplog: Any) -> None:
    run = FakeRun(CodebookAlarm(every_n_steps=10))
    run.usage = {"pixel": SimpleNamespace(counts=counts)}
    run.steps(9)
    assert not run.logged
    run.steps(1)
    assert run.logged.get("alarm/pixel_codebook", 0) == raised == len(caplog.records)


def test_only_what_is_new_counts(caplog: Any) -> None:
    run = FakeRun(CodebookAlarm(every_n_steps=1))
    counts = torch.full((100,), 50)
    run.usage = {"semantic": SimpleNamespace(counts=counts)}
    run.steps(1)
    counts[:3] += 1000
    run.steps(1)
    assert run.logged == {"alarm/semantic_codebook": 1}
    assert "3.0 % of 100 codes" in caplog.text and "codebook_start" in caplog.text


def fit(shapes: Path, folder: Path, alarm: L.Callback, collapsed: bool = False) -> L.Trainer:
    torch.manual_seed(0)
    loss = DualViTokLoss(perceptual_weight=0, adversarial_weight=0.5, adversarial_start=0)
    discriminator = PatchDiscriminator(width=8, num_layers=2)
    module = DualViTokModule(build_tiny(), loss, discriminator=discriminator)
    if collapsed:
        module.model.pixel_quantizer.frozen_codebook.fill_(1.0)
    data = ImageDataModule([Source(str(shapes / "train"))], val_sizes=[], num_workers=0)
    trainer = trainer_for(folder, [Phase(16, "fixed", 64, 4, 4)], alarm)
    trainer.fit(module, data)
    return trainer


def test_a_healthy_run_is_quiet(shapes: Path, tmp_path: Path, caplog: Any) -> None:
    trainer = fit(shapes, tmp_path, CodebookAlarm(every_n_steps=16, perplexity=0.01, usage=0.02))
    fit(shapes, tmp_path, GANAlarm(patience=16))
    assert "alarm" not in caplog.text
    assert not [name for name in trainer.callback_metrics if "alarm" in name]


def test_a_collapsed_codebook_ends_a_run_that_asks_for_it(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(
        Collapse, match=r"pixel_codebook at training step 16: 1.0 % of 96 codes .*alarm-step=16"
    ):
        fit(shapes, tmp_path, CodebookAlarm(every_n_steps=16, stop=True), collapsed=True)
    saved = torch.load(tmp_path / "alarm-step=16.ckpt", weights_only=True)
    assert saved["global_step"] == 16
    assert saved["callbacks"]["CodebookAlarm"]["events"] == {"pixel_codebook": 1}


def test_going_back_does_not_help_against_a_collapse() -> None:
    error = Collapse("...")
    Rollback().on_exception(SimpleNamespace(), SimpleNamespace(), error)  # type: ignore[arg-type]
    assert not hasattr(error, "restarts")


def test_contradictions_are_refused(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="usage is 2"):
        CodebookAlarm(usage=2)
    with pytest.raises(ValueError, match="patience is 0"):
        GANAlarm(patience=0)
    with pytest.raises(ValueError, match="GANAlarm is for DualViTokModule, this is a LightningModule"):
        GANAlarm().setup(SimpleNamespace(), L.LightningModule(), "fit")  # type: ignore[arg-type]
