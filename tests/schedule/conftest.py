"""Fixtures of the schedule's tests."""

from collections.abc import Callable
from pathlib import Path

import pytest
from toy_world import PROGRAM, write_world

from illume_lightning.schedule.command import main


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with the world's files."""
    monkeypatch.chdir(write_world(tmp_path / "world"))
    return tmp_path / "world"


@pytest.fixture
def do(world: Path) -> Callable[..., int]:
    """`illume schedule schedule.yaml` with more words; returns the exit status."""
    return lambda *words: main(["schedule.yaml", *words], PROGRAM)
