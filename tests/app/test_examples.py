"""Examples out of held-out conversations."""

from pathlib import Path

import pytest

from illume_lightning import Illume
from illume_lightning.app.examples import read_examples
from illume_lightning.data.worlds.shapes_conversations import prepare_shapes_conversations

TASKS = ("generation", "editing", "understanding", "text", "reconstruction")


@pytest.fixture(scope="module")
def world(illume: Illume, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    for task in TASKS:
        prepare_shapes_conversations(
            folder / task / "val",
            tokenizer=str(illume.text_tokenizer.folder),
            task=task,
            count=8,
            split="val",
            sizes=((32, 32),),
        )
    return folder


def test_every_tab_gets_its_own(world: Path) -> None:
    examples = read_examples(world, 3)
    assert len(examples.prompts) == len(set(examples.prompts)) == 3
    assert all(prompt.startswith(("a ", "an ", "nothing")) for prompt in examples.prompts), examples.prompts
    assert len(examples.edits) == len(examples.pictures) == 3
    for image, instruction in examples.edits:
        assert image.size == (32, 32)
        assert "Please" not in instruction
    with_picture = [question for question, image in examples.questions if image is not None]
    assert (len(with_picture), len(examples.questions)) == (3, 6)
    assert not any("<image>" in question for question, _ in examples.questions)


def test_one_store(world: Path) -> None:
    examples = read_examples(world / "generation" / "val", 2)
    assert (len(examples.prompts), len(examples.edits), len(examples.questions)) == (2, 0, 0)


def test_a_folder_without_stores_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="illume prepare"):
        read_examples(tmp_path)
