from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from callbacks.resolution_curriculum import ResolutionCurriculum
from illume_lightning.data.loader import PlanBatches, PlanLoader
from illume_lightning.data.plan import DatasetSource, Phase, Plan

PHASES = [
    Phase(3, "fixed", 32, 4, 2),
    Phase(5, "multi_ratio", 48, 2, 2),
    Phase(8, "any_resolution", 64, 6, 2),
]


class Numbers:
    writes_images = False

    def read(self, items, images=None):
        return torch.tensor([item.sample_number for item in items])


class Data(L.LightningDataModule):
    """Follows a curriculum without any pictures."""

    def set_curriculum(self, phases):
        self.phases = phases

    def train_dataloader(self):
        import numpy as np

        source = DatasetSource("a", np.full((20, 2), 64), np.zeros(20, dtype=int))
        batches = PlanBatches(Plan(self.phases, [source]), 0, 1)
        return PlanLoader(Numbers(), batches, lambda: self.trainer.global_step, "")

    def val_dataloader(self):
        return DataLoader(torch.arange(2))


class Manual(L.LightningModule):
    def __init__(self, steps_per_batch: int | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.steps_per_batch = steps_per_batch
        self.seen: list[tuple] = []
        self.scheduler = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        rate = optimizer.param_groups[0]["lr"]
        self.seen.append(
            (batch_idx, self.global_step, self.micro_batch, self.accumulation, batch.tolist(), rate)
        )
        self.manual_backward((self.weight - batch.float().mean()).square().sum() / self.accumulation)
        self.log("train/loss", float(batch_idx))
        is_last = self.micro_batch == self.accumulation - 1
        for _ in range(int(is_last) if self.steps_per_batch is None else self.steps_per_batch):
            optimizer.step()
            optimizer.zero_grad()

    def validation_step(self, batch, batch_idx):
        self.log("val/step", float(self.global_step))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD([{"params": [self.weight]}], lr=1e-3)
        schedulers = [torch.optim.lr_scheduler.ConstantLR(optimizer)] if self.scheduler else []
        return [optimizer], schedulers


class Automatic(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch, batch_idx):
        return (self.weight - batch.float().mean()).square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def run(
    phases: list[Phase],
    module: L.LightningModule | None = None,
    *callbacks: L.Callback,
    data: Any = None,
    ckpt_path: Any = None,
    **options: Any,
) -> tuple[L.Trainer, Any]:
    module = module or Manual()
    defaults = {
        "accelerator": "cpu",
        "max_steps": phases[-1].until_step,
        "max_epochs": -1,
        "logger": False,
        "limit_val_batches": 0,
        "enable_checkpointing": bool(callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(callbacks=[ResolutionCurriculum(phases), *callbacks], **(defaults | options))
    trainer.fit(module, data or Data(), ckpt_path=ckpt_path, weights_only=True)
    return trainer, module


def test_module_is_told_its_place_in_the_training_step():
    _, module = run(PHASES)
    assert [seen[:4] for seen in module.seen] == [
        (0, 0, 0, 2), (1, 0, 1, 2), (2, 1, 0, 2), (3, 1, 1, 2), (4, 2, 0, 2), (5, 2, 1, 2),
        (6, 3, 0, 1), (7, 4, 0, 1),
        (8, 5, 0, 3), (9, 5, 1, 3), (10, 5, 2, 3), (11, 6, 0, 3), (12, 6, 1, 3), (13, 6, 2, 3),
        (14, 7, 0, 3), (15, 7, 1, 3), (16, 7, 2, 3),
    ]  # fmt: skip
    assert [n for seen in module.seen for n in seen[4]] == list(range(34))


def test_phase_at():
    curriculum = ResolutionCurriculum(PHASES)
    assert [PHASES.index(curriculum.phase_at(step)) for step in range(8)] == [0, 0, 0, 1, 1, 2, 2, 2]
    with pytest.raises(ValueError, match="training step 8 is outside"):
        curriculum.phase_at(8)


def test_logs_count_training_steps(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    run(
        PHASES, None, logger=logger, log_every_n_steps=1, limit_val_batches=1.0,
        val_check_interval=6, check_val_every_n_epoch=None,
    )  # fmt: skip
    header, *lines = (tmp_path / "metrics.csv").read_text().splitlines()
    rows = [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]
    training = [row for row in rows if row["train/loss"]]
    names = ("step", "curriculum/phase", "curriculum/side")
    places = [tuple(float(row[name]) for name in names) for row in training]
    assert places == [
        *[(0, 0, 32)] * 2, *[(1, 0, 32)] * 2, *[(2, 0, 32)] * 2, (3, 1, 48), (4, 1, 48),
        *[(5, 2, 64)] * 3, *[(6, 2, 64)] * 3, *[(7, 2, 64)] * 3,
    ]  # fmt: skip
    validation = [(int(row["step"]), float(row["val/step"])) for row in rows if row["val/step"]]
    # After 6 and 12 micro-batches: after training step 3 (numbers 0 to 2), and within step number 6.
    assert validation == [(2, 3.0), (6, 6.0)]


def test_learning_rates_of_phases(tmp_path):
    phases = [Phase(2, "fixed", 32, 4, 2, lr=0.1), Phase(4, "fixed", 32, 4, 2, lr=0.01)]
    save = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    _, module = run(phases, None, save)
    assert [seen[5] for seen in module.seen] == [0.1] * 4 + [0.01] * 4
    _, module = run(phases, None, ckpt_path=tmp_path / "step=1.ckpt")
    assert [seen[5] for seen in module.seen] == [0.1] * 2 + [0.01] * 4
    future = [phases[0], Phase(4, "fixed", 32, 4, 2, lr=0.5)]
    _, module = run(future, None, ckpt_path=tmp_path / "step=2.ckpt")
    assert [seen[5] for seen in module.seen] == [0.5] * 4


def test_learning_rates_without_phases_stay():
    _, module = run(PHASES)
    assert {seen[5] for seen in module.seen} == {1e-3}


# -- resuming --


@pytest.fixture
def checkpoints(tmp_path):
    save = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    run(PHASES, None, save)
    return tmp_path


def test_state_holds_the_phases(checkpoints):
    state = torch.load(checkpoints / "step=5.ckpt", weights_only=True)["callbacks"]["ResolutionCurriculum"]
    assert [Phase(**phase) for phase in state["phases"]] == PHASES
    assert state["phase"] == 1


def test_future_phases_can_change(checkpoints):
    phases = [*PHASES[:1], Phase(6, "multi_ratio", 48, 2, 1), Phase(9, "fixed", 96, 2, 2)]
    _, module = run(phases, None, ckpt_path=checkpoints / "step=4.ckpt")
    # Until step 4 the run has 3 x 2 + 1 x 2 micro-batches under the new phases.
    assert [seen[:4] for seen in module.seen] == [
        (8, 4, 0, 2), (9, 4, 1, 2), (10, 5, 0, 2), (11, 5, 1, 2), (12, 6, 0, 1), (13, 7, 0, 1), (14, 8, 0, 1),
    ]  # fmt: skip
    assert [n for seen in module.seen for n in seen[4]] == list(range(14, 24))


@pytest.mark.parametrize("how", ["checkpoint of the last step", "checkpoint after training"])
def test_a_finished_run_can_be_extended(checkpoints, tmp_path, how):
    path = checkpoints / "step=8.ckpt"
    if how == "checkpoint after training":
        trainer, _ = run(PHASES)
        path = tmp_path / "end.ckpt"
        trainer.save_checkpoint(path)
    trainer, module = run([*PHASES, Phase(10, "fixed", 96, 2, 1)], None, ckpt_path=path)
    assert [seen[:4] for seen in module.seen] == [(17, 8, 0, 2), (18, 8, 1, 2), (19, 9, 0, 2), (20, 9, 1, 2)]
    assert trainer.global_step == 10
    if how == "checkpoint of the last step":
        assert trainer.current_epoch == 1, "the extension belongs to the one epoch that a run has"


def test_a_finished_run_stays_finished(checkpoints):
    trainer, module = run(PHASES, None, ckpt_path=checkpoints / "step=8.ckpt")
    assert module.seen == []
    assert trainer.global_step == 8


@pytest.mark.parametrize(
    "phases",
    [
        [Phase(3, "fixed", 64, 4, 2), *PHASES[1:]],
        [Phase(2, "fixed", 32, 4, 2), *PHASES[1:]],
        [Phase(3, "fixed", 32, 8, 2), *PHASES[1:]],
        [Phase(3, "any_resolution", 32, 4, 2), *PHASES[1:]],
        [Phase(5, "fixed", 32, 4, 2), *PHASES[2:]],
        [Phase(1, "fixed", 32, 4, 2), *PHASES],
    ],
)
def test_past_phases_cannot_change(checkpoints, phases):
    with pytest.raises(ValueError, match="the phases of the 4 training steps in the checkpoint have changed"):
        run(phases, None, ckpt_path=checkpoints / "step=4.ckpt")


def test_checkpoints_that_cannot_be_continued(checkpoints, tmp_path):
    with pytest.raises(ValueError, match="has 8 training steps, and the phases end at 3"):
        run(PHASES[:1], None, ckpt_path=checkpoints / "step=8.ckpt")
    checkpoint = torch.load(checkpoints / "step=4.ckpt", weights_only=True)
    del checkpoint["callbacks"]["ResolutionCurriculum"]
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="written without a ResolutionCurriculum"):
        run(PHASES, None, ckpt_path=tmp_path / "other.ckpt")


def test_validating_a_checkpoint_ignores_the_phases(checkpoints):
    trainer = L.Trainer(
        accelerator="cpu", callbacks=[ResolutionCurriculum(PHASES[:1])], logger=False,
        enable_checkpointing=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.validate(
        Manual(), Data(), ckpt_path=checkpoints / "step=8.ckpt", weights_only=True, verbose=False
    )
    assert trainer.callback_metrics["val/step"] == 0


# -- refusals --


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 10}, "last phase ends at step 8 and trainer.max_steps is 10; set both"),
        ({"max_steps": -1}, "last phase ends at step 8 and trainer.max_steps is -1"),
        ({"max_epochs": 3}, "trainer.max_epochs is 3; set it to -1"),
        ({"limit_train_batches": 5}, "trainer.limit_train_batches is 5; set it to 1.0"),
    ],
)
def test_trainers_that_contradict(options, message):
    with pytest.raises(ValueError, match=message):
        run(PHASES, **options)


def test_accumulation_from_two_places():
    phases = [Phase(8, "fixed", 32, 4, 4)]
    with pytest.raises(ValueError, match="trainer.accumulate_grad_batches is 2; set it to 1"):
        run(phases, Automatic(), accumulate_grad_batches=2)


def test_automatic_optimization_cannot_accumulate():
    run([Phase(4, "fixed", 32, 4, 4)], Automatic())
    with pytest.raises(ValueError, match="need 3 micro-batches per training step, and Automatic optimises"):
        run(PHASES, Automatic())


def test_learning_rates_from_two_places():
    module = Manual()
    module.scheduler = True
    with pytest.raises(ValueError, match="keep only one"):
        run([Phase(2, "fixed", 32, 4, 2, lr=0.1)], module)


def test_data_that_cannot_follow():
    class Other(L.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(torch.arange(9))

    with pytest.raises(ValueError, match="Other cannot follow a curriculum"):
        run(PHASES, data=Other())


@pytest.mark.parametrize("steps_per_batch", [0, 1, 2])
def test_modules_that_count_other_steps_are_found(steps_per_batch):
    with pytest.raises(RuntimeError, match="belongs to training step .* trainer.global_step is"):
        run(PHASES, Manual(steps_per_batch))


def test_fast_dev_run_takes_the_first_micro_batch():
    _, module = run(PHASES, fast_dev_run=True)
    assert [seen[:4] for seen in module.seen] == [(0, 0, 0, 2)]
