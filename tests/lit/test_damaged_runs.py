"""`illume fit` and its siblings on a run with a damaged checkpoint, or one that is being trained."""

import os
from pathlib import Path

import pytest
import torch
from tiny_fit import STEPS, vision_encoder

import cli
from illume_lightning.folder_lock import locked
from illume_lightning.run_check import FIT_LOCK


def fails(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_the_command_goes_back_to_the_last_good_checkpoint(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    words = vision_encoder(tmp_path / "run", shapes)
    checkpoints = tmp_path / "run" / "checkpoints"
    last, good = checkpoints / "last.ckpt", checkpoints / "step=2.ckpt"
    with locked(tmp_path / "run", FIT_LOCK):
        assert f"is being worked on by process {os.getpid()} on" in fails(words, capsys)
    assert not checkpoints.exists()
    cli.main(words)
    assert last.samefile(checkpoints / f"step={STEPS}.ckpt")
    expected = torch.load(last, weights_only=True)["state_dict"]
    with last.open("r+b") as file:
        file.seek(last.stat().st_size // 2)
        file.write(b"bit rot")
    (checkpoints / "step=6.ckpt.1.writing").touch()
    for command in (["validate", *words[1:]], [*words, f"--ckpt_path={last}"]):
        line = fails(command, capsys)
        assert f"{last} is damaged: its sha256" in line and f"{good} (step 2) beside it is whole" in line
    cli.main(words)
    assert f"{last} is damaged" in caplog.text and f"going on from {good}" in caplog.text
    again = torch.load(last, weights_only=True)
    assert again["global_step"] == STEPS
    for name, value in expected.items():
        assert torch.equal(again["state_dict"][name], value), name
    found = sorted(path.name for path in checkpoints.iterdir() if path.suffix != ".sha256")
    aside = ["last.ckpt.damaged", f"step={STEPS}.ckpt.damaged"]
    assert found == sorted(["last.ckpt", "step=2.ckpt", f"step={STEPS}.ckpt", *aside])
    for path in checkpoints.glob("*.ckpt"):
        os.truncate(path, 100)
    before = {path.name: path.stat().st_mtime_ns for path in checkpoints.iterdir()}
    assert "has no checkpoint that is whole" in fails(words, capsys)
    assert {path.name: path.stat().st_mtime_ns for path in checkpoints.iterdir()} == before
