"""Going back to the last checkpoint and past what broke the run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import KillAt, Killed, assert_equal, saved, train

import cli
from callbacks import LossSpikes, Rollback
from illume_lightning.lit.sentinel import Divergence
from illume_lightning.lit.training import TrainingModule

HERE = Path(__file__).parent


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rollbacks.jsonl").read_text().splitlines()]


def leave_out(folder: Path, *steps: int) -> None:
    folder.mkdir(exist_ok=True)
    record = {"step": max(steps), "left_out": list(steps)}
    (folder / "rollbacks.jsonl").write_text(json.dumps(record) + "\n")


@pytest.fixture(scope="module")
def expected(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """A run that never broke, and leaves the steps 5 and 6 out."""
    folder = tmp_path_factory.mktemp("expected")
    leave_out(folder, 5, 6)
    train(shapes, folder, Rollback())
    return saved(folder)


def test_a_run_goes_back_and_on_without_what_broke_it(shapes: Path, tmp_path: Path, expected: Any) -> None:
    module, trainer = train(shapes, tmp_path, Rollback(), module={"nan_at": [6]})
    assert trainer.global_step == 12
    assert module.trained == [4, *range(7, 12)]  # from the checkpoint on
    assert trainer.optimizers[0].param_groups[0]["lr"] == 1e-2 * 0.5**3  # schedules count all steps
    assert_equal(saved(tmp_path), expected)
    (line,) = lines(tmp_path)
    assert (line["step"], line["left_out"], line["values"]) == (6, [5, 6], {"loss": "nan"})
    assert line["checkpoint"] == str(tmp_path / "checkpoints" / "last.ckpt")
    assert len(line["samples"]) == 4 and all(sample.startswith("0:") for sample in line["samples"])


def test_without_it_the_weights_differ(shapes: Path, tmp_path: Path, expected: Any) -> None:
    train(shapes, tmp_path)
    assert not torch.equal(saved(tmp_path)["layer.weight"], expected["layer.weight"])


def test_only_the_step_itself_and_the_start_of_the_run(shapes: Path, tmp_path: Path) -> None:
    module, _ = train(shapes, tmp_path, Rollback(skip_steps=1), module={"nan_at": [2]})
    assert module.trained == [0, 1, *range(3, 12)]
    assert lines(tmp_path)[0]["checkpoint"] is None


@pytest.mark.parametrize("step", [5, 7, 9, 11])
def test_killed_and_started_again_it_ends_the_same(
    shapes: Path, tmp_path: Path, expected: Any, step: int
) -> None:
    with pytest.raises(Killed):
        train(shapes, tmp_path, Rollback(), KillAt(step), module={"nan_at": [6]})
    train(shapes, tmp_path, Rollback(), module={"nan_at": [6]})
    assert_equal(saved(tmp_path), expected)
    assert len(lines(tmp_path)) == 1


def test_the_checkpoint_knows_too(shapes: Path, tmp_path: Path, expected: Any) -> None:
    """As in another folder."""
    with pytest.raises(Killed):
        train(shapes, tmp_path, Rollback(), KillAt(9), module={"nan_at": [6]})
    before = lines(tmp_path)
    (tmp_path / "rollbacks.jsonl").unlink()
    train(shapes, tmp_path, Rollback())
    assert_equal(saved(tmp_path), expected)
    assert lines(tmp_path) == before


def test_micro_batches(shapes: Path, tmp_path: Path) -> None:
    broken = {"nan_at": [6], "of_micro_batch": 1}
    train(shapes, tmp_path / "a", Rollback(), micro=2, module=broken)
    leave_out(tmp_path / "b", 5, 6)
    train(shapes, tmp_path / "b", Rollback(), micro=2)
    assert_equal(saved(tmp_path / "a"), saved(tmp_path / "b"))
    assert len(lines(tmp_path / "a")[0]["samples"]) == 2


def test_it_gives_up(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(
        Divergence, match=r"training step 8 .* gone back 2 times .*rollbacks\.jsonl"
    ) as caught:
        train(shapes, tmp_path, Rollback(2, 1), module={"nan_at": range(6, 12)})
    assert "\n" not in str(caught.value)
    assert [line["step"] for line in lines(tmp_path)] == [6, 7]
    assert all(torch.isfinite(value).all() for value in saved(tmp_path).values())


def test_a_spike_of_the_loss(shapes: Path, tmp_path: Path) -> None:
    module, _ = train(
        shapes, tmp_path, Rollback(), LossSpikes(stop_at=100), steps=80, every=70, module={"high_at": [75]}
    )
    assert module.trained == [*range(70, 74), *range(76, 80)]
    (line,) = lines(tmp_path)
    assert line["step"] == 75 and line["values"]["train/loss"] > 1


def test_wrong_options_and_files(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_rollbacks is 0"):
        Rollback(0)
    (tmp_path / "rollbacks.jsonl").write_text("what?\n")
    with pytest.raises(ValueError, match=r"rollbacks\.jsonl is not what Rollback writes .* remove it"):
        train(shapes, tmp_path, Rollback())


def test_the_command_starts_again_by_itself(
    shapes: Path, tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    note = TrainingModule.require_finite

    def spoilt(self: TrainingModule, values: dict[str, torch.Tensor], batch: Any) -> None:
        broken = self.global_step == 3
        note(self, {name: value * torch.nan if broken else value for name, value in values.items()}, batch)

    monkeypatch.setattr(TrainingModule, "require_finite", spoilt)
    phases = "[{until_step: 5, mode: any_resolution, side: 64, batch_size: 4, micro_batch_size: 4}]"
    flags = {
        "trainer.max_steps": 5,
        "trainer.default_root_dir": tmp_path,
        "trainer.callbacks+": "callbacks.Rollback",
        "trainer.val_check_interval": 5,
        "curriculum.phases": phases,
        "data.train": f"[{{path: {shapes / 'train'}}}]",
        "data.val": f"{{shapes: {shapes / 'val'}}}",
        "data.num_workers": 0,
    }
    yaml = HERE.parents[1] / "experiments/shapes/vision_encoder.yaml"
    cli.main(["fit", "-c", str(yaml), *(f"--{name}={value}" for name, value in flags.items())])
    assert [line["left_out"] for line in lines(tmp_path)] == [[2, 3]]
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 5
    assert (
        "going back to the start: caption_loss, region_loss is not finite at training step 3" in caplog.text
    )


def test_all_processes_go_back_together(shapes: Path, tmp_path: Path) -> None:
    """Only the second one sees NaN, in the first of two micro-batches."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (HERE.parents[1], HERE.parent)))}
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(HERE / "rollback_run.py"),
        str(shapes),
        str(tmp_path / "two"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = lines(tmp_path / "two")
    assert len(line["samples"]) == 1
    assert f"dataset:index {line['samples'][0]})" in done.stderr
    for rank in range(2):
        assert (tmp_path / f"two/process{rank}").read_text() == f"{[4, 4, *sorted([*range(7, 12)] * 2)]} of 2"
