"""Handing weights over: strict, by prefix, only at a fresh start."""

from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch import nn

from callbacks import WarmStart
from callbacks.result_table import markdown


class Module(L.LightningModule):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"tower": nn.Linear(width, width), "head": nn.Linear(width, 1)})


def start(
    callback: WarmStart, module: L.LightningModule, stage: str = "fit", resumed: str | None = None
) -> None:
    callback.setup(SimpleNamespace(ckpt_path=resumed), module, stage)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "earlier.bin"
    torch.save(
        {"vision.weight": torch.full((4, 4), 2.0), "vision.bias": torch.ones(4), "other": torch.ones(1)}, path
    )
    return path


def test_one_part_is_filled_and_the_rest_left(checkpoint: Path) -> None:
    module = Module()
    head = module.model["head"].weight.clone()
    start(WarmStart(str(checkpoint), {"vision.": "model.tower."}), module)
    assert torch.equal(module.model["tower"].weight, torch.full((4, 4), 2.0))
    assert torch.equal(module.model["head"].weight, head)


def test_nothing_happens_when_resuming_or_validating(checkpoint: Path) -> None:
    module = Module()
    before = module.model["tower"].weight.clone()
    callback = WarmStart(str(checkpoint), {"vision.": "model.tower."})
    start(callback, module, resumed="last.ckpt")
    start(callback, module, stage="validate")
    assert torch.equal(module.model["tower"].weight, before)


def test_what_does_not_fit_is_named(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"weight: \(4, 4\) in the file, \(5, 5\) in the model"):
        start(WarmStart(str(checkpoint), {"vision.": "model.tower."}), Module(5))
    with pytest.raises(ValueError, match="missing in the file"):
        start(WarmStart(str(checkpoint), {"nowhere.": "model.tower."}), Module())
    with pytest.raises(FileNotFoundError, match="run the stage that writes it first"):
        start(WarmStart("gone.ckpt", {"": ""}), Module())


def test_the_table_has_a_row_per_data_set() -> None:
    table = markdown(
        {"val/a-64/psnr": 20.123456, "val/a-64/ssim": 0.5, "val/b-64/psnr": 30.0, "train/loss": 1.0}
    )
    lines = table.splitlines()
    assert lines[0] == "| data | psnr | ssim |"
    assert lines[2:] == ["| a-64 | 20.12 | 0.5 |", "| b-64 | 30 |  |"]
