"""The record of steps whose loss or gradient stood out."""

import json
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import KillAt, Killed, data, train

from callbacks import LossSpikes
from illume_lightning.data.schedule import Phase
from illume_lightning.lit.loss_spikes import LEAST, keep_before, samples_of
from illume_lightning.lit.sentinel import Divergence

SPIKE = {"high_at": [70, 75], "of_micro_batch": 1}
OPTIONS: dict[str, Any] = {"steps": 80, "every": 20, "micro": 2, "module": SPIKE}


def lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / "spikes.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def whole(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train(shapes, folder, **OPTIONS)
    return folder


def test_a_spike_is_recorded_with_its_samples(shapes: Path, whole: Path) -> None:
    first, second = lines(whole)
    assert (first["step"], second["step"], first["phase"]) == (70, 75, 0)
    assert first["deviations"].keys() == {"train/loss", "train/grad_norm"}
    assert min(first["deviations"].values()) > 20
    assert first["values"]["train/loss"] > 1 and first["gradient_norms"]["train/grad_norm"] > 1
    assert first["learning_rates"] == {"0": pytest.approx(1e-2 * 0.5 ** (70 // 4))}
    planned = data(shapes)
    planned.set_curriculum([Phase(80, "fixed", 32, 4, 4)])
    planned.setup("fit")
    items = planned.plan.batch(70, 0, 0, 1)
    assert first["samples"] == [f"{item.dataset}:{item.index}" for item in items]


@pytest.mark.parametrize("step", [67, 72, 79])
def test_a_resumed_run_records_the_same(shapes: Path, tmp_path: Path, whole: Path, step: int) -> None:
    with pytest.raises(Killed):
        train(shapes, tmp_path, KillAt(step), **OPTIONS)
    assert len(lines(tmp_path)) == (step > 70) + (step > 75)
    train(shapes, tmp_path, **OPTIONS)
    assert lines(tmp_path) == lines(whole)


def test_a_run_outlives_its_record(shapes: Path, tmp_path: Path, caplog: Any) -> None:
    """As on a full disk; here the file can't be made."""
    (tmp_path / "spikes.jsonl").symlink_to(tmp_path / "nowhere" / "spikes.jsonl")
    _, trainer = train(shapes, tmp_path, **OPTIONS)
    assert trainer.global_step == 80
    assert "training step 70 stands out, and can't be recorded" in caplog.text


def test_a_quiet_run_has_no_file(shapes: Path, tmp_path: Path) -> None:
    train(shapes, tmp_path, steps=80, every=100)
    assert not (tmp_path / "spikes.jsonl").exists()


def test_it_stops_where_it_is_told_to(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(
        Divergence, match=r"the loss of training step 70 is .* spreads above .*callbacks\.Rollback"
    ) as caught:
        train(shapes, tmp_path, LossSpikes(stop_at=50), **OPTIONS)
    assert len(caught.value.samples) == 4
    assert not caught.value.restarts
    assert not (tmp_path / "checkpoints" / "step=70.ckpt").exists()


def deviations(spikes: LossSpikes, values: list[float]) -> list[float]:
    found = []
    for value in values:
        found.append(spikes._deviation("x", value))
        spikes._history.setdefault("x", deque()).append(value)
    return found


def test_the_scale_is_robust() -> None:
    torch.manual_seed(0)
    noise = (5 + torch.randn(LEAST)).tolist()
    noise[3] = 1e6  # an earlier spike does not hide a later one
    *before, high = deviations(LossSpikes(), [*noise, 25.0])
    assert max(before) == 0.0
    assert 15 < high < 27
    smooth = [1.0] * LEAST
    assert deviations(LossSpikes(), [*smooth, 1.02])[-1] == pytest.approx(1)
    assert deviations(LossSpikes(), [*smooth, 0.0])[-1] < 0


def test_what_the_loss_is_made_of_may_change(shapes: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """As by the start of an adversary."""
    monkeypatch.setattr("tiny_training.Means.regime", lambda self, step: [step >= 70])
    train(shapes, tmp_path, steps=80, every=100, module={"high_at": range(70, 80)})
    assert lines(tmp_path) == []


def test_lines_of_steps_done_again_go(tmp_path: Path) -> None:
    path = tmp_path / "spikes.jsonl"
    keep_before(path, 3)
    assert not path.exists()
    path.write_text('{"step": 1}\n{"step": 5}\n{"step": 7}\n{"st')
    keep_before(path, 6)
    assert path.read_text() == '{"step": 1}\n{"step": 5}\n'
    assert [file.name for file in tmp_path.iterdir()] == ["spikes.jsonl"]


def test_without_a_plan_there_are_no_samples_of_others() -> None:
    trainer: Any = type("Trainer", (), {"datamodule": None})()
    assert samples_of(trainer, 3) == []


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match="deviations is 0"):
        LossSpikes(deviations=0)
    with pytest.raises(ValueError, match="stop_at is -1"):
        LossSpikes(stop_at=-1)
    with pytest.raises(ValueError, match="window is 5"):
        LossSpikes(window=5)
