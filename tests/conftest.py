"""Fixtures that several test folders share."""

import os
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import settings

settings.register_profile("the same each time", derandomize=True, deadline=None)
settings.load_profile("the same each time")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Modules of these tests whose classes configurations may name.
os.environ["ILLUME_ALLOW"] = "tiny,tiny_mllm,test_export,test_evaluate"


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """A run with FSDP2 leaves its port in the environment, where processes that a later test starts would take it."""
    with patch.dict(os.environ):
        yield


@pytest.fixture(scope="session")
def parity_dir() -> Path:
    """Folder of recorded tensors of the official model; the test skips, saying so, where there is none."""
    named = os.environ.get("ILLUME_PARITY_DIR")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "parity"
    if not folder.is_dir():
        pytest.skip(f"no parity fixtures at {folder}; set ILLUME_PARITY_DIR to their folder")
    return folder


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``train`` (48 pictures, square and wide) and ``val`` (16) stores of the shapes world."""
    from illume_lightning.data.worlds.prepare_shapes import prepare_shapes

    folder = tmp_path_factory.mktemp("shapes")
    sizes = ((112, 112), (80, 160))
    prepare_shapes(folder / "train", count=48, split="train", sizes=sizes)
    prepare_shapes(folder / "val", count=16, split="val", sizes=sizes)
    return folder
