"""The command line: help, errors in one line, runs that continue."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import cli

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("args", [[], ["--help"], ["fit", "--help"], ["predict", "-h"]])
def test_help_needs_no_heavy_import(args: list[str]) -> None:
    code = f"import sys, cli; cli.main({args!r}); assert not {{'torch', 'lightning', 'litdata'}} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: illume")


@pytest.mark.parametrize(
    "command",
    ["plan", "generate", "evaluate", "report", "schedule", "reproduce", "consolidate", "parity", "doctor"],
)
def test_help_of_our_own_commands(command: str) -> None:
    code = (
        f"import sys, cli\ntry: cli.main([{command!r}, '--help'])\nexcept SystemExit as stop: assert not stop.code\n"
        "assert not {'torch', 'lightning', 'litdata'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"illume {command}" in done.stdout


def fails(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a wrong call ends in."""
    with pytest.raises(SystemExit) as stop:
        cli.main(args)
    assert stop.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"illume {args[0]}: error: ")
    return last


SHAPES = ["fit", "-c", str(ROOT / "experiments/shapes/dualvitok.yaml")]


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--model.loss.pixel_loss=l7", ["model.loss.pixel_loss", "one of 'l1', 'l2'", "l7"]),
        ("--model.model.noise.kind=salt", ["noise.kind", "'neighbour'", "salt"]),
        ("--model.model.pixel_decoder.chanels=3", ["chanels"]),
        ("--trainer.max_stps=3", ["unrecognized", "max_stps"]),
        ("--trainer.precision=bf17", ["trainer.precision", "bf16-mixed", "bf17"]),
        ("--data.num_workers=two", ["data.num_workers", "int", "two"]),
        ("--trainer.accelerator=warp", ["warp", "cpu"]),
        ("--trainer.accelerator=tpu", ["torch_xla"]),
        ("--data.train=[{path: nowhere}]", ["nowhere", "illume prepare"]),
        ("--ckpt_path=gone.ckpt", ["gone.ckpt"]),
        (
            "--curriculum.phases=[{until_step: 5, mode: fixed, side: 100, batch_size: 4, micro_batch_size: 4}]",
            ["side 100", "multiple of 16"],
        ),
    ],
)
def test_wrong_values_end_in_one_line(
    flag: str, expected: list[str], shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [f"--data.train=[{{path: {shapes / 'train'}}}]", f"--data.val={{shapes: {shapes / 'val'}}}"]
    line = fails([*SHAPES, f"--trainer.default_root_dir={tmp_path}", *data, flag], capsys)
    for part in expected:
        assert part in line, line
    assert len(line) < 700


def test_phases_that_contradict_max_steps(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["fit", "-c", str(ROOT / "experiments/shapes/vision_encoder.yaml"), "--trainer.max_steps=77"]
    stores = [f"--data.train=[{{path: {shapes / 'train'}}}]", f"--data.val={{shapes: {shapes / 'val'}}}"]
    line = fails([*args, *stores, f"--trainer.default_root_dir={tmp_path}"], capsys)
    assert "step 500" in line
    assert "max_steps is 77" in line


def test_unknown_command_and_missing_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown command 'train'" in fails(["train"], capsys)
    assert "nofile.yaml" in fails(["fit", "-c", "nofile.yaml"], capsys)
    assert "nowhere" in fails(["parity", "nowhere"], capsys)


def test_evaluation_without_a_checkpoint_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["validate", *SHAPES[1:], f"--trainer.default_root_dir={tmp_path}"]
    assert "run `illume fit` first" in fails(args, capsys)


TINY = (
    "--trainer.max_steps=4",
    "--curriculum.phases=[{until_step: 2, mode: fixed, side: 64, batch_size: 4, micro_batch_size: 2}, "
    "{until_step: 4, mode: any_resolution, side: 96, batch_size: 2, micro_batch_size: 2}]",
    "--trainer.val_check_interval=2",
    "--trainer.log_every_n_steps=1",
    "--data.val_sizes=[64]",
    "--data.val_any_resolution=96",
    "--data.val_limit=8",
    "--data.num_workers=0",
    "--model.codebook_start.steps=1",
    "--model.codebook_start.batches=2",
    "--model.model.pixel_quantizer.codebook_size=32",
    "--model.model.semantic_quantizer.codebook_size=16",
)


def test_a_run_from_the_shipped_yaml(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Vision encoder, hand-over, two phases, pictures, table; run again it does nothing; validate finds it."""
    stores = [f"--data.train=[{{path: {shapes / 'train'}}}]", f"--data.val={{shapes: {shapes / 'val'}}}"]
    encoder = [
        "fit",
        "-c",
        str(ROOT / "experiments/shapes/vision_encoder.yaml"),
        f"--trainer.default_root_dir={tmp_path / 'vision_encoder'}",
        "--trainer.max_steps=2",
        "--curriculum.phases=[{until_step: 2, mode: any_resolution, side: 64, batch_size: 4, micro_batch_size: 4}]",
        "--trainer.val_check_interval=2",
        "--data.num_workers=0",
        *stores,
    ]
    cli.main(encoder)
    run = tmp_path / "run"
    start = tmp_path / "vision_encoder/checkpoints/last.ckpt"
    assert start.is_file(), "the last step must be saved, whatever every_n_train_steps is"
    overlay = tmp_path / "overlay.yaml"
    config = yaml.safe_load((ROOT / "experiments/shapes/dualvitok.yaml").read_text())
    callbacks = config["trainer"]["callbacks"]
    callbacks[0]["init_args"]["checkpoint"] = str(start)
    overlay.write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    args = ["-c", str(overlay), f"--trainer.default_root_dir={run}", *TINY, *stores]
    cli.main([*SHAPES, *args])
    output = capsys.readouterr().out
    assert "| shapes-64 |" in output
    for name in ("shapes-64.png", "shapes-any96.png"):
        assert (run / "pictures/step=000004" / name).is_file()
    assert (run / "config.yaml").is_file()
    tower = {
        key.removeprefix("model.tower."): value
        for key, value in torch.load(start, weights_only=True)["state_dict"].items()
        if key.startswith("model.tower.")
    }
    trained = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert trained["global_step"] == 4
    for key, value in tower.items():
        assert torch.equal(trained["state_dict"]["model.semantic_encoder.model." + key], value), key
    before = (run / "checkpoints/last.ckpt").stat().st_mtime_ns
    cli.main([*SHAPES, *args])
    assert (run / "checkpoints/last.ckpt").stat().st_mtime_ns == before, "a finished run is left alone"
    cli.main(["validate", *SHAPES[1:], *args])
    output = capsys.readouterr().out
    assert "last.ckpt:" in output
    assert "| shapes-64 |" in output
    assert (run / "pictures/validate/shapes-64.png").is_file()
    line = fails(["validate", *SHAPES[1:], *args, "--model.model.pixel_quantizer.codebook_size=48"], capsys)
    assert "last.ckpt does not fit" in line
    assert "(32, 8) in the file, (48, 8) in the model" in line
    cli.main(["predict", *SHAPES[1:], *args, f"--data.predict={{mine: {shapes / 'val'}}}"])
    assert len(list((run / "predictions/mine-64").glob("*.png"))) == 8
    assert len(list((run / "predictions/mine-any96").glob("*.png"))) == 8


def test_the_decoder_from_the_shipped_yaml(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tokenizer's run folder is enough to train, resume, validate and predict with."""
    stores = [f"--data.train=[{{path: {shapes / 'train'}}}]", f"--data.val={{shapes: {shapes / 'val'}}}"]
    tokenizer, run, overlay = tmp_path / "tokenizer", tmp_path / "run", tmp_path / "overlay.yaml"
    callbacks = yaml.safe_load((ROOT / "experiments/shapes/dualvitok.yaml").read_text())["trainer"][
        "callbacks"
    ]
    overlay.write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks[1:]}}))  # without a vision encoder
    cli.main([*SHAPES, "-c", str(overlay), f"--trainer.default_root_dir={tokenizer}", *TINY, *stores])
    yaml_file = ["-c", str(ROOT / "experiments/shapes/diffusion_decoder.yaml")]
    args = [
        *yaml_file,
        f"--trainer.default_root_dir={run}",
        f"--model.tokenizer={tokenizer}",
        "--trainer.max_steps=4",
        "--curriculum.phases=[{until_step: 2, mode: fixed, side: 64, batch_size: 4, micro_batch_size: 2, "
        "size_step: 32}, {until_step: 4, mode: multi_ratio, side: 64, batch_size: 2, micro_batch_size: 2, "
        "size_step: 32}]",
        "--trainer.val_check_interval=2",
        "--trainer.log_every_n_steps=1",
        "--data.val_ratios=64",
        "--data.val_limit=4",
        "--data.num_workers=0",
        "--model.sampling.num_steps=2",
        "--model.decoder.sizes=[[64, 64], [64, 128], [64, 96]]",
        *stores,
    ]
    cli.main(["fit", *args])
    output = capsys.readouterr().out
    for row in ("diffusion", "dualvitok", "diffusion-wrong10", "dualvitok-wrong10"):
        assert f"| shapes-ratio64-{row} |" in output
    assert (run / "pictures/step=000004/shapes-ratio64.png").is_file()
    cli.main(["predict", *args, f"--data.predict={{mine: {shapes / 'val'}}}"])
    written = {path.name for path in (run / "predictions/mine-ratio64").iterdir()}
    assert len(written) == 12
    assert {name.split("-", 1)[1] for name in written} == {"diffusion.png", "dualvitok.png", "row.png"}
    line = fails(["fit", *args, f"--model.tokenizer={tmp_path / 'gone'}"], capsys)
    assert "no tokenizer at" in line
    line = fails(["validate", *args, "--model.decoder.sizes=[[96, 64]]"], capsys)
    assert "the diffusion decoder has none of this aspect ratio" in line
