"""A model small enough to try the page with."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import build_tiny
from tiny_mllm import build_mllm

from illume_lightning.app.studio import Studio
from illume_lightning.data.text_tokenizer import TextTokenizer
from illume_lightning.data.worlds.shapes_conversations import prepare_shapes_tokenizer
from illume_lightning.lit.illume import Illume

SIZES = ((32, 32), (32, 64), (64, 32))


@pytest.fixture(autouse=True)
def files_of_the_page(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))


@pytest.fixture(scope="session")
def text_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    folder = tmp_path_factory.mktemp("text")
    prepare_shapes_tokenizer(folder)
    return TextTokenizer(folder)


@pytest.fixture(scope="session")
def illume(text_tokenizer: TextTokenizer) -> Illume:
    torch.manual_seed(0)
    vocabulary = text_tokenizer.vocabulary(64, 96, size_step=16)
    mllm = build_mllm(vocabulary=vocabulary, slot_grid=4)
    torch.nn.init.normal_(mllm.slot_embedding.weight)
    return Illume(mllm, text_tokenizer, build_tiny().eval(), sizes=SIZES, max_side=64, slots=6, context=2048)


@pytest.fixture
def studio(illume: Illume) -> Studio:
    return Studio(illume)


@pytest.fixture
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def picture_path(picture: Image.Image, tmp_path: Path) -> Path:
    picture.save(tmp_path / "picture.png")
    return tmp_path / "picture.png"
