"""A model small enough to try the page with."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_illume import build_illume

from illume_lightning.app.studio import Studio
from illume_lightning.lit.illume import Illume


@pytest.fixture(autouse=True)
def files_of_the_page(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))


@pytest.fixture(scope="session")
def illume(tmp_path_factory: pytest.TempPathFactory) -> Illume:
    return build_illume(tmp_path_factory.mktemp("text"))


@pytest.fixture
def studio(illume: Illume) -> Studio:
    return Studio(illume)


@pytest.fixture
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def picture_path(picture: Image.Image) -> Path:
    """As if it had been uploaded."""
    path = Path(os.environ["GRADIO_TEMP_DIR"]) / "picture.png"
    picture.save(path)
    return path
