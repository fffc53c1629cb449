"""Whole evaluations of runs small enough for a test: files, repetition, and what can't be evaluated."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DDPMScheduler
from tiny_run import write_dualvitok_run, write_mllm_run, write_run

import cli
from illume_lightning.data.text_tokenizer import TextTokenizer
from illume_lightning.data.worlds.photographs import prepare_photographs
from illume_lightning.data.worlds.prepare_shapes import prepare_shapes
from illume_lightning.data.worlds.shapes_conversations import (
    prepare_shapes_conversations,
    prepare_shapes_tokenizer,
)
from illume_lightning.evaluation.pictures import psnr, ssim, tower_distance
from illume_lightning.evaluation.run import Options, evaluate_run
from illume_lightning.evaluation.scores import Score, ScoreSheet
from illume_lightning.lit.illume import Illume
from illume_lightning.lit.tokenizer import load_tokenizer
from illume_lightning.nn.diffusion_decoder import DiffusionDecoder, build_unet
from illume_lightning.nn.latents import SpaceToDepth

SIDE = 32
QUICK = Options(limit=3, device="cpu", slots=4)


def tiny_decoder() -> DiffusionDecoder:
    """Untrained."""
    unet = build_unet(48, 16, [16, 32], [0, 1], 16, 8, 4, 4, 4)
    scheduler = DDPMScheduler(prediction_type="v_prediction", clip_sample=False)
    return DiffusionDecoder(unet, SpaceToDepth(4), scheduler, sizes=[(64, 64)])


def configure(run: Path, **data: Any) -> None:
    """Name held-out data in a run's configuration."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    init_args = config.setdefault("data", {}).setdefault("init_args", {})
    init_args |= data
    (run / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of all parts, and held-out stores."""
    folder = tmp_path_factory.mktemp("world")
    prepare_shapes_tokenizer(folder / "text_tokenizer")
    for task in ("understanding", "generation", "editing", "text"):
        prepare_shapes_conversations(
            folder / task, tokenizer=str(folder / "text_tokenizer"), task=task, count=4, split="val",
            sizes=((SIDE, SIDE),),
        )  # fmt: skip
    prepare_shapes(folder / "shapes", count=4, split="val", sizes=((64, 64),))
    dualvitok = write_dualvitok_run(folder / "dualvitok")
    configure(folder / "dualvitok", val={"shapes": str(folder / "shapes")}, val_sizes=[32, 64])
    write_mllm_run(folder / "mllm", TextTokenizer(folder / "text_tokenizer"), dualvitok)
    stores = {
        task: {"path": str(folder / task)} for task in ("understanding", "generation", "editing", "text")
    }
    configure(folder / "mllm", val=stores, row_tokens=512)
    torch.manual_seed(0)
    module = {
        "class_path": "illume_lightning.lit.diffusion_decoder.DiffusionDecoderModule",
        "init_args": {
            "decoder": {"class_path": "test_evaluate.tiny_decoder"},
            "tokenizer": str(folder / "dualvitok"),
            "sampling": {"num_steps": 2, "guidance": 1.0},
        },
    }
    trainer = {"max_steps": 10}
    config = {"model": module, "trainer": trainer, "seed_everything": 5}
    write_run(folder / "decoder", tiny_decoder(), config, global_step=4)
    configure(folder / "decoder", test={"shapes": str(folder / "shapes")}, val_ratios=64, val_size_step=32)
    return folder


def copied(world: Path, tmp_path: Path, part: str) -> Path:
    return Path(shutil.copytree(world / part, tmp_path / part))


def found(sheet: ScoreSheet) -> dict[tuple[str, str], Score]:
    return {(score.task, score.name): score for score in sheet.scores}


# -- an MLLM --


@pytest.fixture(scope="module")
def evaluated(world: Path) -> ScoreSheet:
    options = Options(str(world / "dualvitok"), 3, device="cpu", slots=4)
    sheet, is_new = evaluate_run(world / "mllm", options)
    assert is_new
    return sheet


def test_an_mllm_is_scored_in_all_tasks(world, evaluated):
    scores = found(evaluated)
    assert {task for task, _ in scores} == {"understanding", "generation", "editing", "text"}
    assert scores["understanding", "all"].n == 12
    assert set(scores["understanding", "all"].baselines) == {"chance", "without_picture"}
    assert set(scores["text", "all"].baselines) == {"chance"}
    assert scores["generation", "scene"].n == scores["editing", "edit"].n == 3
    assert scores["text", "perplexity"].unit == "perplexity"
    for score in scores.values():
        assert score.low <= score.value <= score.high, score
    for task in ("generation", "editing"):
        assert 0 < scores[task, "tower_distance"].value < 2
        assert scores[task, "tower_distance"].unit == "distance"


def test_the_perplexity_is_that_of_the_validation(world, evaluated):
    """By the engine's own prompts, one answer after another, instead of packed rows."""
    from illume_lightning.data.conversation_store import ConversationStore
    from illume_lightning.lit.prompts import Chat

    illume = Illume.from_run(world / "mllm", device="cpu", context=768, slots=2)
    nats = tokens = 0.0
    store = ConversationStore(world / "text")
    for index in (0, 1, 2):
        turns = store.read(index).conversation.turns
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        for number in range(1, len(turns), 2):
            prompt = illume.prompts.ask(Chat(messages[:number])).request.prompt
            tokenizer = illume.text_tokenizer
            answer = [*tokenizer.encode(turns[number].text), tokenizer.end_of_turn, *tokenizer.encode("\n")]
            ids = torch.tensor([[*prompt.ids, *answer]])
            with torch.no_grad():
                embeds = illume.mllm.embed_tokens(ids, torch.zeros_like(ids))
                hidden = illume.mllm.hidden(embeds, torch.arange(ids.shape[1])[None])
                logits = illume.mllm.head.logits(hidden[0, -len(answer) - 1 : -1]).log_softmax(-1)
            nats -= float(logits.gather(-1, ids[0, -len(answer) :, None]).sum())
            tokens += len(answer)
    expected = float(torch.tensor(nats / tokens).exp())
    assert found(evaluated)["text", "perplexity"].value == pytest.approx(expected, rel=1e-3)


def test_files_of_an_evaluation(world, evaluated):
    folder = world / "mllm" / "scores"
    content = json.loads((folder / "scores.json").read_text())
    assert content["part"] == "mllm"
    assert content["settings"]["finished"] is True
    assert set(content["settings"]["stores"]) == {"understanding", "generation", "editing", "text"}
    for sample in content["samples"]:
        files = [*sample["given"], *sample["made"], *([sample["wanted"]] if sample["wanted"] else [])]
        assert all((folder / file).is_file() for file in files)
        assert len(sample["made"]) == (sample["task"] in ("generation", "editing"))
    assert (folder / "scores.md").read_text().count("\n| understanding |") >= 2
    assert r"\toprule" in (folder / "scores.tex").read_text()


def test_the_same_command_gives_the_same_scores(world, evaluated, tmp_path):
    options = Options(str(world / "dualvitok"), 3, device="cpu", slots=4)
    again, is_new = evaluate_run(world / "mllm", options, again=True, out=tmp_path)
    assert is_new
    assert (again.scores, again.samples) == (evaluated.scores, evaluated.samples)
    for file in (world / "mllm" / "scores" / "pictures").iterdir():
        assert file.read_bytes() == (tmp_path / "pictures" / file.name).read_bytes()


def test_pictures_need_a_tokenizer(world, tmp_path):
    with pytest.raises(ValueError, match=r"editing, generation ask for pictures.*--tokenizer"):
        evaluate_run(world / "mllm", QUICK, tmp_path)


def test_stores_of_another_text_tokenizer_are_refused(world, tmp_path):
    prepare_shapes_tokenizer(tmp_path / "other", vocab_size=300)
    prepare_shapes_conversations(
        tmp_path / "text", tokenizer=str(tmp_path / "other"), task="text", count=2, split="val"
    )
    run = copied(world, tmp_path, "mllm")
    configure(run, val={"text": {"path": str(tmp_path / "text")}})
    with pytest.raises(ValueError, match="was prepared with another text tokenizer"):
        evaluate_run(run, QUICK)


# -- a tokenizer and a diffusion decoder --


def test_a_tokenizer_is_scored_at_every_size(world, tmp_path):
    sheet, _ = evaluate_run(world / "dualvitok", QUICK, tmp_path)
    scores = found(sheet)
    assert sheet.part == "dualvitok"
    names = {
        "psnr",
        "ssim",
        "scene",
        "semantic_usage",
        "semantic_perplexity",
        "pixel_usage",
        "pixel_perplexity",
    }
    wrong = {"psnr", "ssim", "scene"}
    assert set(scores) == {(f"shapes-{side}", name) for side in (32, 64) for name in names} | {
        (f"shapes-{side}-wrong10", name) for side in (32, 64) for name in wrong
    }
    assert scores["shapes-64-wrong10", "psnr"].value != scores["shapes-64", "psnr"].value
    assert scores["shapes-64", "scene"].baselines == {"originals": 1.0}
    assert 0 < scores["shapes-64", "pixel_usage"].value <= 3 * 16 / 96
    assert {sample.task for sample in sheet.samples} == {"shapes-32", "shapes-64"}
    again, _ = evaluate_run(world / "dualvitok", QUICK, tmp_path / "again")
    assert again.scores == sheet.scores
    assert sheet.samples[0].prompt.endswith("background")


def test_a_diffusion_decoder_is_held_against_the_tokenizer(world, tmp_path, caplog):
    sheet, _ = evaluate_run(world / "decoder", QUICK, tmp_path)
    scores = found(sheet)
    assert set(scores) == {("shapes", name) for name in ("psnr", "ssim", "tower_distance", "scene")}
    assert set(scores["shapes", "psnr"].baselines) == {"dualvitok"}
    assert set(scores["shapes", "scene"].baselines) == {"dualvitok", "originals"}
    assert (sheet.step, sheet.settings["finished"], sheet.settings["run_seed"]) == (4, False, 5)
    assert "is not finished" in caplog.text
    other, _ = evaluate_run(world / "decoder", Options(limit=3, seed=1, device="cpu"), tmp_path)
    assert found(other)["shapes", "psnr"].value != scores["shapes", "psnr"].value
    assert found(other)["shapes", "psnr"].baselines == scores["shapes", "psnr"].baselines


def test_pictures_of_other_worlds_have_no_scenes(world, tmp_path):
    prepare_photographs(tmp_path / "photographs")
    run = copied(world, tmp_path, "dualvitok")
    configure(run, val={"photographs": str(tmp_path / "photographs" / "val")}, val_sizes=[32])
    sheet, _ = evaluate_run(run, QUICK)
    assert ("photographs", "psnr") in found(sheet)
    assert ("photographs", "scene") not in found(sheet)


def test_distances_of_pictures(world):
    encoder = load_tokenizer(world / "dualvitok").semantic_encoder
    pictures = torch.rand(2, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        assert tower_distance(encoder, pictures, pictures) == pytest.approx([0, 0], abs=1e-6)
        assert min(tower_distance(encoder, pictures, -pictures)) > 0
    assert psnr(pictures, pictures) == pytest.approx([100, 100])
    # 0.2 of a range of 2: a tenth.
    assert psnr(pictures, pictures + 0.2) == pytest.approx([20, 20], rel=1e-4)
    assert ssim(pictures, pictures) == pytest.approx([1, 1])


# -- the command --


def test_what_is_there_is_not_made_again(world, tmp_path, capsys):
    run = copied(world, tmp_path, "dualvitok")
    command = ["evaluate", str(run), "--limit=2", "--device=cpu"]
    cli.main(command)
    first = capsys.readouterr().out
    assert "| shapes-32 | psnr |" in first
    before = (run / "scores" / "scores.json").stat().st_mtime_ns
    cli.main(command)
    second = capsys.readouterr().out
    assert "evaluated already on" in second and "--again" in second
    assert second.endswith(first)
    assert (run / "scores" / "scores.json").stat().st_mtime_ns == before
    cli.main([*command, "--again"])
    cli.main(["evaluate", str(run), "--limit=1", "--device=cpu"])
    assert "evaluated already" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "args", "expected"),
    [
        ({}, ["--limit=0"], "limit is 0"),
        ({"val": None}, [], "names no stores under data.init_args.test or val"),
        ({}, ["--split=test"], "names no stores under data.init_args.test: .* choose another split"),
        ({"val": {"shapes": "nowhere"}}, [], "there is no store at nowhere"),
    ],
)
def test_mistakes_end_in_one_line(world, tmp_path, capsys, change, args, expected):
    run = copied(world, tmp_path, "dualvitok")
    configure(run, **change)
    with pytest.raises(SystemExit) as stop:
        cli.main(["evaluate", str(run), "--device=cpu", *args])
    assert stop.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(f"illume evaluate: error: .*{expected}", last)


def test_a_sharded_checkpoint_names_the_way_out(world, tmp_path):
    run = copied(world, tmp_path, "dualvitok")
    last = run / "checkpoints" / "last.ckpt"
    last.unlink()
    last.mkdir()
    for name in ("meta.pt", ".metadata"):
        (last / name).touch()
    with pytest.raises(
        ValueError, match=f"`illume evaluate` takes a file: .* `illume consolidate {last} {last}`"
    ):
        evaluate_run(run, QUICK)


def test_other_folders_are_no_runs(world, tmp_path):
    with pytest.raises(FileNotFoundError, match="is no run"):
        evaluate_run(tmp_path, QUICK)
    run = copied(world, tmp_path, "dualvitok")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["class_path"] = "illume_lightning.lit.vision_encoder.VisionEncoderModule"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match=r"is a run of .*VisionEncoderModule: give one of an MLLM"):
        evaluate_run(run, QUICK)
