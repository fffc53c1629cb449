"""Fixtures that several test folders share."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def parity_dir() -> Path:
    """Folder of recorded tensors of the official model; the test skips, saying so, where there is none."""
    named = os.environ.get("ILLUME_PARITY_DIR")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "parity"
    if not folder.is_dir():
        pytest.skip(f"no parity fixtures at {folder}; set ILLUME_PARITY_DIR to their folder")
    return folder
