"""The MLLM's stages: what trains, packed batches from stores and caches, resume, evaluation."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from test_diffusion_decoder_module import weights, write_tokenizer
from tiny_mllm import build_mllm
from tiny_trainer import trainer_for

from callbacks import ResultTable, Throughput, WarmStart
from illume_lightning.data.packed_batch import PackedBatch
from illume_lightning.data.schedule import Phase
from illume_lightning.data.text_tokenizer import TextTokenizer
from illume_lightning.data.token_sequence import SEGMENTS
from illume_lightning.data.worlds.shapes_conversations import (
    prepare_shapes_conversations,
    prepare_shapes_tokenizer,
)
from illume_lightning.lit.conversation_data import ConversationDataModule, Conversations
from illume_lightning.lit.dualvitok import to_float
from illume_lightning.lit.lora import LoRA
from illume_lightning.lit.mllm import MLLMStage, MLLMStage1, MLLMStage2, MLLMStage3
from illume_lightning.lit.prepare_tokens import prepare_tokens
from illume_lightning.lit.token_metrics import TokenMetrics
from illume_lightning.vocabulary import Vocabulary

TASKS = ("reconstruction", "captioning", "generation", "understanding", "editing", "text")
SIDE = 32


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text tokenizer, DualViTok run, a store of every task, and codes of the images to generate."""
    folder = tmp_path_factory.mktemp("world")
    prepare_shapes_tokenizer(folder / "text_tokenizer")
    write_tokenizer(folder / "dualvitok")
    for task in TASKS:
        for split, count in (("train", 12), ("val", 6)):
            prepare_shapes_conversations(
                folder / task / split,
                tokenizer=str(folder / "text_tokenizer"),
                task=task,
                count=count,
                split=split,
                sizes=((SIDE, SIDE), (32, 64)),
            )
    for task in ("reconstruction", "generation", "editing"):
        prepare_tokens(
            str(folder / task / "train"), folder / task / "codes", str(folder / "dualvitok"), side=SIDE
        )
    return folder


def vocabulary(world: Path, pixel_first: bool = False) -> Vocabulary:
    given = TextTokenizer(world / "text_tokenizer").vocabulary(64, 96, size_step=16)
    return replace(given, pixel_first=pixel_first)


def data(
    world: Path, *tasks: str, cached: bool = True, pixel_first: bool = False, **options: Any
) -> ConversationDataModule:
    def train(task: str) -> Conversations:
        has_codes = cached and (world / task / "codes").is_dir()
        return Conversations(str(world / task / "train"), tokens=[str(world / task / "codes")] * has_codes)

    options = {"row_tokens": 512, "num_workers": 0, "val_side": SIDE} | options
    return ConversationDataModule(
        str(world / "text_tokenizer"),
        vocabulary(world, pixel_first),
        train={task: train(task) for task in tasks},
        val={task: Conversations(str(world / task / "val")) for task in tasks},
        **options,
    )


def build(
    world: Path,
    stage: type[MLLMStage] = MLLMStage2,
    lr: float = 2e-3,
    pixel_first: bool = False,
    discrete_input: bool = False,
    **options: Any,
) -> MLLMStage:
    torch.manual_seed(0)
    rates = dict.fromkeys(stage.rates, lr)
    options = {"tokenizer": str(world / "dualvitok"), "learning_rates": rates} | options
    words = vocabulary(world, pixel_first)
    return stage(build_mllm(vocabulary=words, slot_grid=4, discrete_input=discrete_input), **options)


def phases(steps: int, batch: int = 8, micro: int = 4, mode: str = "fixed", **options: Any) -> list[Phase]:
    return [Phase(steps, mode, SIDE, batch, micro, **options)]


def batches(module: ConversationDataModule, run: list[Phase], folder: Path) -> list[PackedBatch]:
    """Training batches as a trainer would read them."""
    module.set_curriculum(run)
    module.setup("fit")
    module.trainer = trainer_for(folder, run)
    return list(module.train_dataloader())


# -- what trains --


def test_rates_are_those_of_table_1():
    assert MLLMStage1.rates == {"adapters": 1e-3, "vision_tables": 2e-4}
    assert MLLMStage2.rates == {"adapters": 5e-5, "llm": 5e-5}
    assert MLLMStage3.rates == {"adapters": 2e-5, "llm": 2e-5, "vision_tower": 2e-6}


@pytest.mark.parametrize("stage", [MLLMStage1, MLLMStage2, MLLMStage3])
def test_a_stage_trains_its_parts_and_nothing_else(world, tmp_path, stage, caplog):
    options = {"vit_from_layer": 1} if stage is MLLMStage3 else {}
    module = build(world, stage, **options)
    before = weights(module)
    with caplog.at_level("INFO"):
        trainer_for(tmp_path, phases(2)).fit(module, data(world, *TASKS))
    changed = {key for key, value in module.state_dict().items() if not torch.equal(value, before[key])}
    moved = {key.removeprefix("model.").split(".")[0] for key in changed}
    adapters = {"semantic_adapter", "pixel_adapter", "slot_embedding"}
    expected = {
        MLLMStage1: adapters | {"embedding", "head"},
        MLLMStage2: adapters | {"embedding", "head", "trunk"},
        MLLMStage3: adapters | {"embedding", "head", "trunk", "semantic_encoder", "pixel_encoder"},
    }[stage]
    assert moved == expected
    if stage is MLLMStage1:
        assert {"model.embedding.text", "model.head.text"}.isdisjoint(changed)
    if stage is MLLMStage3:
        assert not any(
            key.startswith(("model.semantic_encoder.blocks.0.", "model.pixel_encoder.down."))
            for key in changed
        )
        assert not any("patch_embed" in key for key in changed)
    # Frozen parts have neither gradients nor optimizer state.
    optimizer = module.all_optimizers()[0].optimizer
    held = {id(parameter) for parameter in optimizer.state}
    for name, parameter in module.named_parameters():
        assert parameter.requires_grad == (id(parameter) in held), name
        assert parameter.requires_grad or parameter.grad is None, name
    printed = [line.split() for line in caplog.text.splitlines() if " lr " in line]
    assert [line[0] for line in printed] == list(stage.rates)
    assert all(line[-1] == "2.0e-03" for line in printed)


def test_a_rate_of_what_the_stage_freezes(world):
    with pytest.raises(ValueError, match="MLLMStage1 does not train llm; it trains adapters, vision_tables"):
        build(world, MLLMStage1, learning_rates={"llm": 1e-3})
    with pytest.raises(ValueError, match="vit_from_layer is 9, the ViT has"):
        build(world, MLLMStage3, vit_from_layer=9)


# -- batches --


@pytest.mark.parametrize("options", [{}, {"pixel_first": True}], ids=["", "pixel first"])
def test_cached_and_online_codes_give_the_same_batches(world, tmp_path, options):
    module = build(world, **options)
    module.setup("fit")
    tasks = ("reconstruction", "generation", "editing")
    cached = batches(data(world, *tasks, **options), phases(3), tmp_path)
    online = batches(data(world, *tasks, cached=False, **options), phases(3), tmp_path)
    assert len(cached) == len(online) == 6
    for one, other in zip(cached, online, strict=True):
        assert not one.target_images and other.target_images
        assert not torch.equal(one.ids, other.ids)
        assert torch.equal(module.tokenized(one), module.tokenized(other))
        for name in ("position_ids", "document_ids", "target_positions", "segments", "semantic_slots"):
            assert torch.equal(getattr(one, name), getattr(other, name))


def test_pixel_first_predicts_pixel_codes_before_semantic_ones(world, tmp_path):
    for options, first in (({}, "semantic"), ({"pixel_first": True}, "pixel")):
        (batch, *_) = batches(data(world, "generation", **options), phases(1), tmp_path)
        codes = [kind for kind in batch.segments.tolist() if SEGMENTS[kind] in ("semantic", "pixel")]
        assert SEGMENTS[codes[0]] == first
    module = build(world, pixel_first=True)
    run = phases(2)
    trainer_for(tmp_path, run, log_every_n_steps=1).fit(module, data(world, *TASKS, pixel_first=True))
    assert {"train/generation/pixel_loss", "train/editing/semantic_loss"} <= set(
        module.trainer.callback_metrics
    )


@pytest.mark.parametrize("stage", [MLLMStage1, MLLMStage3])
def test_discrete_input_trains_tokens_alone(world, tmp_path, stage):
    options = {"vit_from_layer": 0} if stage is MLLMStage3 else {}
    module = build(world, stage, discrete_input=True, **options)
    before = weights(module)
    trainer_for(tmp_path, phases(2)).fit(module, data(world, *TASKS))
    changed = {key for key, value in module.state_dict().items() if not torch.equal(value, before[key])}
    moved = {key.removeprefix("model.").split(".")[0] for key in changed}
    assert moved == {"slot_embedding", "embedding", "head"} | ({"trunk"} if stage is MLLMStage3 else set())
    held = {id(parameter) for parameter in module.all_optimizers()[0].optimizer.state}
    for name, parameter in module.named_parameters():
        assert parameter.requires_grad == (id(parameter) in held), name


@torch.no_grad()
def test_discrete_input_sees_pictures_by_their_codes(world, tmp_path):
    module, continuous = build(world, discrete_input=True), build(world)
    for one in (module, continuous):
        one.setup("fit")
    (batch, *_) = batches(data(world, "understanding", "editing"), phases(1), tmp_path)
    assert batch.images and not batch.target_images
    assert continuous.tokenized(batch) is batch.ids
    ids = module.tokenized(batch).flatten()
    words = module.model.vocabulary
    codes = [module.fixed["tokenizer"].encode(to_float(images)).codes for images in batch.images]
    semantic = torch.cat([grid.semantic.flatten() for grid in codes])
    assert torch.equal(ids[batch.semantic_slots], words.semantic_ids.start + semantic)
    assert (ids[batch.pixel_slots] >= words.pixel_ids.start).all()
    others = torch.ones(len(ids), dtype=torch.bool)
    others[torch.cat([batch.semantic_slots, batch.pixel_slots])] = False
    assert torch.equal(ids[others], batch.ids.flatten()[others])
    mirrored = batch._replace(images=[255 - images for images in batch.images])
    losses = [module._losses(given, 1.0).loss for given in (batch, batch, mirrored)]
    assert losses[0] == losses[1] != losses[2]


def test_workers_change_nothing(world, tmp_path):
    alone = batches(data(world, *TASKS), phases(3), tmp_path)
    helped = batches(data(world, *TASKS, num_workers=2), phases(3), tmp_path)
    for one, other in zip(alone, helped, strict=True):
        assert torch.equal(one.ids, other.ids) and torch.equal(one.sample_number, other.sample_number)
        assert all(torch.equal(a, b) for a, b in zip(one.images, other.images, strict=True))


def test_conditions_are_dropped_at_their_rate(world, tmp_path):
    """By the binomial's bounds: 400 samples at one half stay within 5 standard deviations of 200."""
    run = phases(50)
    kept = {item.sample_number: item.length for step in range(50) for item in _plan(world, run).samples(step)}
    found = batches(data(world, "generation", condition_dropout=0.5), run, tmp_path)
    dropped = 0
    for batch in found:
        for number, sample in enumerate(batch.sample_number.tolist()):
            dropped += int((batch.document_ids == number).sum()) < kept[sample]
    assert 150 <= dropped <= 250
    words = batches(data(world, "text", condition_dropout=1.0), phases(2), tmp_path)
    assert sum(int((batch.segments == 0).sum()) for batch in words) > 0


def _plan(world: Path, run: list[Phase]) -> Any:
    module = data(world, "generation")
    module.set_curriculum(run)
    return module.plan


def test_the_loss_of_a_step_is_the_mean_over_its_tokens(world, tmp_path):
    """However a step is cut into micro-batches and rows, the same weights come out."""
    results = []
    for micro, row_tokens in ((8, 512), (2, 512), (4, 200)):
        module = build(world, gradient_clip=0.0, optimizer=lambda groups: torch.optim.SGD(groups))
        options = {"row_tokens": row_tokens, "condition_dropout": 0.0}
        trainer_for(tmp_path, phases(2, micro=micro)).fit(
            module, data(world, "generation", "editing", **options)
        )
        results.append(weights(module))
    for other in results[1:]:
        for key, value in results[0].items():
            torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-6, msg=key)


# -- runs --


def test_it_learns_every_task(world, tmp_path):
    run = phases(60, batch=12, micro=12)
    module = build(world, lr=3e-3)
    modules = data(world, *TASKS, condition_dropout=0.0)
    modules.tasks["validate"] = modules.tasks["fit"]
    trainer = trainer_for(tmp_path, run)
    trainer.validate(module, modules, verbose=False)
    before = {key: float(value) for key, value in trainer.callback_metrics.items()}
    trainer.fit(module, modules)
    trainer.validate(module, modules, verbose=False)
    after = {key: float(value) for key, value in trainer.callback_metrics.items()}
    for task in TASKS:
        for name in SEGMENTS:
            key = f"val/{task}/{name}_loss"
            if key in before:
                assert after[key] < 0.7 * before[key], key
    assert after["val/captioning/text_accuracy"] > 0.6


@pytest.mark.parametrize("cut", [2, 3])
def test_resume_equals_the_uninterrupted_run(world, tmp_path, cut):
    run = phases(4)
    whole = build(world, MLLMStage3, vit_from_layer=1)
    trainer_for(tmp_path, run).fit(whole, data(world, *TASKS))
    first = build(world, MLLMStage3, vit_from_layer=1)
    trainer = trainer_for(tmp_path, run, _StopAt(cut))
    trainer.fit(first, data(world, *TASKS))
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    second = build(world, MLLMStage3, vit_from_layer=1)
    trainer_for(tmp_path, run).fit(second, data(world, *TASKS), ckpt_path=tmp_path / "cut.ckpt")
    for key, value in weights(whole).items():
        assert torch.equal(second.state_dict()[key], value), key


def muon(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.Muon(groups, lr=1e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")


def test_the_matrices_have_an_optimizer_of_their_own(world, tmp_path, caplog):
    module = build(world, lr=0.0, matrix_optimizer=muon)
    before = weights(module)
    trainer = trainer_for(tmp_path, phases(2))
    with caplog.at_level("INFO"):
        trainer.fit(module, data(world, *TASKS))
    assert trainer.global_step == 2
    moved = {key for key, value in module.state_dict().items() if not torch.equal(value, before[key])}
    trunk = {f"model.trunk.{key}" for key, p in module.model.trunk.named_parameters() if p.ndim == 2}
    assert moved == trunk
    held = [id(p) for o in module.all_optimizers() for group in o.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in module.parameters() if p.requires_grad)
    assert "llm matrices" in caplog.text and "lr 1.0e-02" in caplog.text
    assert "train/matrices_grad_norm" in trainer.callback_metrics


def test_resume_with_two_optimizers_equals_the_uninterrupted_run(world, tmp_path):
    run, options = phases(4), {"matrix_optimizer": muon}
    whole, first, second = (build(world, **options) for _ in range(3))
    trainer_for(tmp_path, run).fit(whole, data(world, *TASKS))
    trainer = trainer_for(tmp_path, run, _StopAt(2))
    trainer.fit(first, data(world, *TASKS))
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    trainer_for(tmp_path, run).fit(second, data(world, *TASKS), ckpt_path=tmp_path / "cut.ckpt")
    for key, value in weights(whole).items():
        assert torch.equal(second.state_dict()[key], value), key


def test_no_matrices_to_optimise(world, tmp_path):
    with pytest.raises(
        ValueError, match="matrix_optimizer is for .* MLLMStage1 does not train: leave it out"
    ):
        trainer_for(tmp_path, phases(1)).fit(
            build(world, MLLMStage1, matrix_optimizer=muon), data(world, "captioning")
        )


class _StopAt(L.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


def test_a_stage_takes_over_from_the_one_before(world, tmp_path):
    first = build(world, MLLMStage1)
    trainer = trainer_for(tmp_path, phases(2))
    trainer.fit(first, data(world, "reconstruction"))
    trainer.save_checkpoint(tmp_path / "stage1.ckpt")
    second = build(world, lr=0.0)
    start = WarmStart(str(tmp_path / "stage1.ckpt"), {"": "model."})
    trainer_for(tmp_path, phases(1), start).fit(second, data(world, "generation"))
    for key, value in weights(first).items():
        assert torch.equal(second.state_dict()[key], value), key
    with pytest.raises(ValueError, match="written by MLLMStage1 .* by MLLMStage2.* WarmStart"):
        trainer_for(tmp_path, phases(2)).fit(
            build(world), data(world, "generation"), ckpt_path=tmp_path / "stage1.ckpt"
        )


def test_any_resolution_and_what_is_logged(world, tmp_path, capsys):
    module = build(world, MLLMStage3, vit_from_layer=0)
    run = phases(2, mode="any_resolution", generation_side=SIDE)
    trainer = trainer_for(tmp_path, run, Throughput(), ResultTable(), log_every_n_steps=1)
    trainer.fit(module, data(world, *TASKS, val_limit=4))
    logged = set(trainer.callback_metrics)
    assert {
        "train/generation/pixel_loss",
        "train/editing/semantic_accuracy",
        "train/text/text_loss",
    } <= logged
    assert {
        "val/generation/marker_accuracy",
        "val/understanding/answer_accuracy",
        "speed/tokens_per_s",
    } <= logged
    assert "val/generation/answer_accuracy" not in logged and "val/text/pixel_loss" not in logged
    assert "understanding" in capsys.readouterr().out


def test_options_of_the_trunk_give_the_same_loss(world, tmp_path):
    results = []
    for options in ({}, {"checkpoint_activations": True}):
        module = build(world, **options)
        trainer_for(tmp_path, phases(2)).fit(module, data(world, "editing", "text"))
        results.append(weights(module))
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.slow
def test_a_compiled_trunk_gives_the_same_weights(world, tmp_path):
    results = []
    for compiled in (False, True):
        module = build(world, compile=compiled)
        trainer_for(tmp_path, phases(2)).fit(module, data(world, "editing", "text"))
        results.append(weights(module))
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.slow
def test_several_processes_make_the_same_codes(world, tmp_path):
    source, tokenizer = str(world / "generation" / "train"), str(world / "dualvitok")
    prepare_tokens(source, tmp_path / "one", tokenizer, side=SIDE, part_items=5)
    prepare_tokens(source, tmp_path / "two", tokenizer, side=SIDE, part_items=5, num_workers=2)
    files = [path.name for path in (tmp_path / "one").iterdir()]
    assert len(files) > 4
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_lora_trains_small_matrices_instead_of_the_trunk(world, tmp_path):
    first = build(world)
    trainer = trainer_for(tmp_path, phases(1))
    trainer.fit(first, data(world, "generation"))
    trainer.save_checkpoint(tmp_path / "stage2.ckpt")
    module = build(world, MLLMStage3, vit_from_layer=1, lora=LoRA(rank=2))
    start = WarmStart(str(tmp_path / "stage2.ckpt"), {"": "model."})
    trainer = trainer_for(tmp_path, phases(2), start)
    trainer.fit(module, data(world, "generation"))
    trained = dict(module.named_parameters())
    assert all(p.requires_grad == (".lora_" in name) for name, p in trained.items() if ".trunk." in name)
    assert not trained["model.embedding.vision"].requires_grad
    before, after = weights(first), weights(module)
    name = "model.trunk.layers.0.self_attn.q_proj"
    assert torch.equal(after[f"{name}.base_layer.weight"], before[f"{name}.weight"])
    assert after[f"{name}.lora_B.default.weight"].abs().max() > 0
    trainer.save_checkpoint(tmp_path / "stage3.ckpt")
    again = build(world, MLLMStage3, vit_from_layer=1, lora=LoRA(rank=2))
    trainer_for(tmp_path, phases(2)).validate(
        again, data(world, "generation"), ckpt_path=tmp_path / "stage3.ckpt", verbose=False
    )
    assert all(torch.equal(value, after[key]) for key, value in again.state_dict().items())


# -- what is refused --


def test_what_does_not_fit_together(world, tmp_path):
    run = phases(1)
    trainer = trainer_for(tmp_path, run)
    with pytest.raises(ValueError, match="without cached codes: set model.tokenizer"):
        trainer.fit(build(world, tokenizer=None), data(world, "generation", cached=False))
    with pytest.raises(ValueError, match="discrete_input: pictures to look at enter as codes: set model.tok"):
        trainer.fit(build(world, tokenizer=None, discrete_input=True), data(world, "captioning"))
    short = data(world, "generation", row_tokens=30)
    short.tasks["validate"] = {}
    with pytest.raises(ValueError, match="leaves nothing of generation: it needs at least .* tokens"):
        trainer_for(tmp_path, run).fit(build(world), short)
    wrong = data(world, "generation")
    wrong._vocabulary = TextTokenizer(world / "text_tokenizer").vocabulary(64, 256, size_step=16)
    with pytest.raises(
        ValueError, match="come from codebooks of 96 pixel and 64 semantic codes, the vocabulary has 256"
    ):
        wrong.setup("fit")
    wrong._vocabulary = Vocabulary(num_text=300, semantic_codes=64, pixel_codes=96, size_step=16)
    with pytest.raises(ValueError, match="the vocabulary has 300 text tokens and .*text_tokenizer has"):
        wrong.setup("fit")
    other = write_tokenizer(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="cached codes were made by another tokenizer"):
        trainer_for(tmp_path, run).fit(build(world, tokenizer=str(other)), data(world, "generation"))
    big = build_mllm(vocabulary=TextTokenizer(world / "text_tokenizer").vocabulary(64, 256, size_step=16))
    with pytest.raises(ValueError, match="has codebooks of .* codes, the vocabulary has"):
        MLLMStage2(big, tokenizer=str(world / "dualvitok")).setup("fit")
    mixed = data(world, "generation")
    mixed.tasks["fit"]["generation"].tokens = [str(world / "editing" / "codes")]
    with pytest.raises(ValueError, match="made from other conversations"):
        mixed.setup("fit")
    mixed.tasks["fit"]["generation"].tokens = [str(world / "generation" / "train")]
    with pytest.raises(ValueError, match="holds conversations, no codes"):
        mixed.setup("fit")


def test_answers_are_right_as_a_whole():
    metrics = TokenMetrics()
    losses = torch.ones(7)
    correct = torch.tensor([True, True, True, False, True, True, True])
    segments = torch.tensor([0, 0, 0, 0, 3, 1, 0])
    answers = torch.tensor([4, 4, 5, 5, 6, 6, 6])  # right, wrong, an image
    metrics.update(losses, correct, segments, answers)
    found = metrics.compute()
    assert found["answer_accuracy"] == 0.5
    assert found["text_accuracy"] == pytest.approx(4 / 5)
    assert found["semantic_accuracy"] == 1 and "pixel_loss" not in found
