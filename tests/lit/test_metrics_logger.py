"""Tables of metrics over several starts of a run, and what TensorBoard shows of them."""

import csv
import os
from pathlib import Path

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from illume_lightning.lit.metrics_logger import MetricsLogger, restart_curves
from illume_lightning.report.metrics import read_metrics


def start(folder: Path) -> MetricsLogger:
    return MetricsLogger(folder, name="metrics")


def log(logger: MetricsLogger, step: int, **metrics: float) -> None:
    """As Lightning does."""
    logger.log_metrics(metrics, step)
    logger.save()


def table(logger: MetricsLogger) -> list[dict[str, str]]:
    with (Path(logger.log_dir) / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_resumed_start_has_the_rows_before_it(tmp_path):
    first = start(tmp_path)
    for step in range(4):
        log(first, step, loss=step / 3)
    log(first, 1, psnr=20.5)
    second = start(tmp_path)
    second.take_over(first.version, until=2)
    log(second, 2, loss=7.0)
    assert Path(second.log_dir).name == "version_1"
    assert table(second) == [
        {"loss": str(0 / 3), "psnr": "", "step": "0"},
        {"loss": str(1 / 3), "psnr": "", "step": "1"},
        {"loss": "", "psnr": "20.5", "step": "1"},
        {"loss": "7.0", "psnr": "", "step": "2"},
    ]
    third = start(tmp_path)
    third.take_over("version_1", until=2)
    log(third, 2, loss=8.0)
    assert [row["loss"] for row in table(third)] == ["0.0", str(1 / 3), "", "8.0"]
    assert dict(read_metrics(tmp_path).series["loss"]) == {0: 0.0, 1: 1 / 3, 2: 8.0, 3: 1.0}


def test_a_start_that_is_gone_leaves_nothing_to_take_over(tmp_path):
    logger = start(tmp_path)
    logger.take_over(5, until=2)
    log(logger, 2, loss=1.0)
    assert [row["step"] for row in table(logger)] == ["2"]


def test_a_row_that_was_cut_off_is_not_taken_over(tmp_path):
    first = start(tmp_path)
    log(first, 0, accuracy=0.5, loss=1.0)
    with (Path(first.log_dir) / "metrics.csv").open("a") as stream:
        stream.write("0.25,")
    second = start(tmp_path)
    second.take_over(0, until=9)
    log(second, 1, loss=3.0)
    assert [row["loss"] for row in table(second)] == ["1.0", "3.0"]


@pytest.mark.parametrize("moment", ["open", "replace"])
def test_a_kill_while_a_column_is_added_loses_no_row(tmp_path, monkeypatch, moment):
    logger = start(tmp_path)
    log(logger, 0, loss=1.0)

    def killed(*given: object) -> None:
        raise KeyboardInterrupt

    if moment == "open":  # the new file is there, and nothing in it
        monkeypatch.setattr(csv.DictWriter, "writeheader", killed)
    else:
        monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        log(logger, 1, loss=2.0, psnr=3.0)
    monkeypatch.undo()
    assert table(logger) == [{"loss": "1.0", "step": "0"}]


def test_tensorboard_shows_each_step_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for values in ({0: 1.0, 1: 2.0, 2: 3.0}, {1: 4.0}):
        logger = TensorBoardLogger(tmp_path, name="", version="")
        if 0 not in values:
            restart_curves(logger, 1)
        for step, value in values.items():
            logger.log_metrics({"loss": value}, step)
        logger.finalize("success")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(point.step, point.value) for point in events.Scalars("loss")] == [(0, 1.0), (1, 4.0)]
