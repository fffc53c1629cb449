"""A run on a damaged store: it ends at once, or goes on with other samples, the same after any interruption."""

import logging
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from broken_stores import damage
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from callbacks.resolution_curriculum import ResolutionCurriculum
from illume_lightning.data.plan import Phase
from illume_lightning.data.store import DamagedRecord
from illume_lightning.lit.datamodule import ImageBatch, ImageDataModule, Source

PHASES = [Phase(8, "multi_ratio", 64, 8, 4)]


@pytest.fixture
def damaged(shapes: Path, tmp_path: Path) -> Path:
    """48 pictures, of which two are damaged."""
    folder = Path(shutil.copytree(shapes / "train", tmp_path / "train"))
    damage(folder, 3, 17)
    return folder


class Recorder(L.LightningModule):
    """Learns a bias per channel, and writes down what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.bias = torch.nn.Parameter(torch.zeros(3))
        self.seen: list[tuple[int, list[int], float]] = []

    def training_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self.seen.append((batch_idx, batch.index.tolist(), float(batch.images.double().mean())))
        self.manual_backward((batch.images.float().mean((0, 2, 3)) / 255 - self.bias).square().sum())
        if batch_idx % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, root: Path, ckpt_path: str | None = None, **options: Any) -> Recorder:
    module = Recorder()
    data = ImageDataModule([Source(str(folder))], **({"num_workers": 0, "seed": 5} | options))
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=-1, max_steps=8, default_root_dir=root,
        callbacks=[ResolutionCurriculum(PHASES), ModelCheckpoint(root, every_n_train_steps=1, save_top_k=-1)],
        logger=CSVLogger(root, "", ""), enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return module


def test_by_default_the_run_ends_and_says_the_way_out(damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DamagedRecord, match=r"record (3|17) of .*train is damaged .*chunk-.*; copy this file again"
    ):
        fit(damaged, tmp_path)


def test_a_tolerant_run_is_repeated_by_a_resumed_one(
    damaged: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        whole = fit(damaged, tmp_path / "whole", max_bad_samples=2)
    assert caplog.text.count("in place of a damaged one") == 2
    rows = (tmp_path / "whole" / "metrics.csv").read_text().splitlines()
    assert "data/replaced" in rows[0] and len(rows) > 2
    assert not {3, 17} & {index for _, indices, _ in whole.seen for index in indices}
    (checkpoint,) = (tmp_path / "whole").glob("*step=3.ckpt")
    again = fit(damaged, tmp_path / "again", str(checkpoint), max_bad_samples=2, num_workers=1)
    assert [seen[1:] for seen in again.seen] == [seen[1:] for seen in whole.seen[6:]]
    assert torch.equal(again.bias, whole.bias)


def test_too_many(damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DamagedRecord, match="2 damaged records are more than max_bad_samples=1; the last: record"
    ):
        fit(damaged, tmp_path, max_bad_samples=1)
    with pytest.raises(ValueError, match="max_bad_samples -1 is negative"):
        ImageDataModule(max_bad_samples=-1)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_score_is_never_over_other_pictures(stage: str, damaged: Path, tmp_path: Path) -> None:
    data = ImageDataModule(**{stage if stage != "validate" else "val": {"x": str(damaged)}}, val_sizes=[64],
                           num_workers=0, max_bad_samples=10)  # fmt: skip
    data.setup(stage)
    loaders = {
        "validate": data.val_dataloader,
        "test": data.test_dataloader,
        "predict": data.predict_dataloader,
    }
    with pytest.raises(DamagedRecord, match="record 3 of"):
        [list(loader) for loader in loaders[stage]()]
