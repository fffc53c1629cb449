"""Scores while training: they are logged, and training is what it is without them."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tiny_mllm import build_mllm
from tiny_run import write_dualvitok_run

from callbacks import ExactResume, GenerationScores, ResolutionCurriculum
from illume_lightning.data.schedule import Phase
from illume_lightning.data.text_tokenizer import TextTokenizer
from illume_lightning.data.worlds.shapes_conversations import (
    prepare_shapes_conversations,
    prepare_shapes_tokenizer,
)
from illume_lightning.lit.conversation_data import ConversationDataModule, Conversations
from illume_lightning.lit.mllm import MLLMStage3

SIDE = 32
TASKS = ("understanding", "generation")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    prepare_shapes_tokenizer(folder / "text_tokenizer")
    write_dualvitok_run(folder / "dualvitok")
    for task in TASKS:
        for split in ("train", "val"):
            prepare_shapes_conversations(
                folder / task / split, tokenizer=str(folder / "text_tokenizer"), task=task, count=4, split=split,
                sizes=((SIDE, SIDE),),
            )  # fmt: skip
    return folder


def parts(
    world: Path, folder: Path, *callbacks: L.Callback, tokenizer: bool = True, **options: Any
) -> tuple[L.Trainer, MLLMStage3, ConversationDataModule]:
    text = TextTokenizer(world / "text_tokenizer")
    torch.manual_seed(0)
    mllm = build_mllm(vocabulary=text.vocabulary(64, 96, size_step=16), slot_grid=4)
    rates = dict.fromkeys(MLLMStage3.rates, 2e-3)
    path = str(world / "dualvitok") if tokenizer else None
    tasks = TASKS if tokenizer else TASKS[:1]
    module = MLLMStage3(mllm, 1, learning_rates=rates, tokenizer=path)
    data = ConversationDataModule(
        str(text.folder),
        train={task: Conversations(str(world / task / "train")) for task in tasks},
        val={task: Conversations(str(world / task / "val")) for task in tasks},
        row_tokens=512,
        val_side=SIDE,
        num_workers=0,
    )
    given: dict[str, Any] = {"max_steps": 4, "val_check_interval": 2, "num_sanity_val_steps": 1} | options
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=-1, check_val_every_n_epoch=None, default_root_dir=folder, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        use_distributed_sampler=False, deterministic=True,
        callbacks=[ResolutionCurriculum([Phase(4, "fixed", SIDE, 4, 4)]), *callbacks], **given,
    )  # fmt: skip
    return trainer, module, data


def weights(module: L.LightningModule) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def train(world: Path, folder: Path, *callbacks: L.Callback, **options: Any) -> tuple[L.Trainer, MLLMStage3]:
    trainer, module, data = parts(world, folder, *callbacks, **options)
    trainer.fit(module, data)
    return trainer, module


def test_scores_are_logged_and_training_is_not_disturbed(world, tmp_path):
    scores = GenerationScores(limit=2)
    trainer, scored = train(world, tmp_path / "a", scores)
    _, plain = train(world, tmp_path / "b")
    logged = trainer.callback_metrics
    for name in ("understanding/all", "generation/scene", "generation/counting", "generation/tower_distance"):
        assert f"val/{name}" in logged
    assert 0 <= logged["val/understanding/all"] <= 1
    assert scores.state_dict() == {"validations": 2}  # not the sanity check
    for name, value in weights(plain).items():
        assert torch.equal(value, scored.state_dict()[name]), name
    gradients = {name: parameter.requires_grad for name, parameter in plain.named_parameters()}
    assert gradients == {name: parameter.requires_grad for name, parameter in scored.named_parameters()}
    assert [part.training for part in scored.modules()] == [part.training for part in plain.modules()]


def test_no_random_number_is_drawn(world, tmp_path, monkeypatch):
    drawn = []

    class Watched(GenerationScores):
        def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            before = ExactResume().state_dict()["ranks"][0]
            super().on_validation_epoch_end(trainer, pl_module)
            after = ExactResume().state_dict()["ranks"][0]
            drawn.append(not torch.equal(before.pop("torch"), after.pop("torch")) or before != after)

    train(world, tmp_path, Watched(limit=1), num_sanity_val_steps=0)
    assert drawn == [False, False]


def test_validations_can_be_left_out_and_are_counted_on(world, tmp_path):
    scores = GenerationScores(limit=1, every_n_validations=3)
    trainer, _ = train(world, tmp_path, scores)
    assert "val/understanding/all" not in trainer.callback_metrics
    trainer, module, data = parts(world, tmp_path, scores)
    trainer.validate(module, data, verbose=False)
    assert "val/understanding/all" in trainer.callback_metrics
    resumed = GenerationScores(limit=1, every_n_validations=3)
    resumed.load_state_dict({"validations": 2})
    trainer, _ = train(world, tmp_path, resumed, max_steps=4, val_check_interval=4)
    assert "val/understanding/all" in trainer.callback_metrics


def test_without_a_tokenizer_only_words_are_scored(world, tmp_path):
    trainer, _ = train(world, tmp_path / "a", GenerationScores(limit=1), tokenizer=False)
    assert "val/understanding/all" in trainer.callback_metrics
    given = GenerationScores(limit=1, tokenizer=str(world / "dualvitok"))
    trainer, module, data = parts(world, tmp_path / "b", given, tokenizer=False)
    data.tasks["validate"]["generation"] = Conversations(str(world / "generation" / "val"))
    assert given._dualvitok(module).semantic_encoder is not None
    assert given._dualvitok(module) is given._dualvitok(module)


def test_numbers_that_make_no_sense():
    with pytest.raises(ValueError, match="limit is 0"):
        GenerationScores(limit=0)
    with pytest.raises(ValueError, match="every_n_validations is 0"):
        GenerationScores(every_n_validations=0)
