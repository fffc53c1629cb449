"""A resumed run says where its rounding differs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from experiment import parse
from tiny_training import KillAt, Killed, Means, assert_equal, saved, train


@pytest.fixture
def two_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_another_number_of_threads_is_named(
    shapes: Path, tmp_path: Path, two_threads: Any, caplog: Any
) -> None:
    with pytest.raises(Killed):
        train(shapes, tmp_path, KillAt(9))
    torch.set_num_threads(1)
    train(shapes, tmp_path)
    assert "not bit for bit" in caplog.text
    assert "threads (OMP_NUM_THREADS) 2 there and 1 here" in caplog.text
    assert caplog.text.count("there and") == 1


def test_kernels_are_named_and_the_same_is_quiet(shapes: Path, tmp_path: Path, caplog: Any) -> None:
    with pytest.raises(Killed):
        train(shapes, tmp_path, KillAt(9), deterministic="warn")
    train(shapes, tmp_path, deterministic="warn", steps=13)
    assert "bit for bit" not in caplog.text
    train(shapes, tmp_path, deterministic=True, steps=14)
    assert "deterministic kernels where there are there and on here" in caplog.text


def test_two_runs_are_equal_bit_for_bit(shapes: Path, tmp_path: Path) -> None:
    """The first level: CPU, `deterministic: true`, the same number of threads."""
    for name in ("one", "other"):
        train(shapes, tmp_path / name, micro=2)
    assert_equal(saved(tmp_path / "one"), saved(tmp_path / "other"))


def test_what_has_no_deterministic_kernel_is_refused_or_warned_of(
    shapes: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """The first and the second level; the operation is one of the few that have none on a CPU either."""
    step = Means.training_step

    def with_put(self: Means, *args: Any) -> None:
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
        step(self, *args)

    monkeypatch.setattr(Means, "training_step", with_put)
    with pytest.raises(RuntimeError, match="put_ does not have a deterministic implementation"):
        train(shapes, tmp_path, deterministic=True)
    with pytest.warns(UserWarning, match="put_ does not have a deterministic implementation"):
        train(shapes, tmp_path, deterministic="warn")


@pytest.mark.parametrize("world", ["shapes", "emoji"])
def test_the_levels_of_the_shipped_runs(world: str) -> None:
    """As docs/reproducibility.md has them."""
    levels = {"dualvitok": "warn", "vision_encoder": True, "mllm_stage1": True, "mllm_stage3": True}
    for part, level in levels.items():
        assert parse(f"{world}/{part}.yaml")["trainer"]["deterministic"] == level, part
