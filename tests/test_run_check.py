"""`illume doctor RUN`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cli
from illume_lightning.folder_lock import holder, locked
from illume_lightning.lit.durable_checkpoints import DurableCheckpointIO
from illume_lightning.run_check import FIT_LOCK, check_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """With checkpoints of two steps."""
    folder, io = tmp_path / "run", DurableCheckpointIO()
    for step in (1, 2):
        path = folder / "checkpoints" / f"step={step}.ckpt"
        io.save_checkpoint({"global_step": step, "state_dict": {"weight": torch.zeros(1000)}}, path)
        io.link_checkpoint(path, path.with_name("last.ckpt"))
    (folder / "config.yaml").write_text("seed_everything: 0\n")
    return folder


def test_a_run_in_order(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path.name for path in run.rglob("*"))
    cli.main(["doctor", str(run)])
    text = capsys.readouterr().out
    assert "WRONG" not in text
    for name, step in (("last", 2), ("step=2", 2), ("step=1", 1)):
        assert f"ok    checkpoints/{name}.ckpt: step {step}, its sha256 is right" in text
    assert "`illume fit` goes on from checkpoints/last.ckpt" in text
    assert "GiB are free" in text and "nobody trains it" in text
    assert sorted(path.name for path in run.rglob("*")) == before


def test_what_is_wrong_is_told_with_the_way_out(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = run / "checkpoints"
    os.truncate(checkpoints / "last.ckpt", 700)
    (checkpoints / "step=1.ckpt.sha256").unlink()
    (checkpoints / "step=3.ckpt.77.writing").touch()
    (checkpoints / "step=0.ckpt.damaged").touch()
    (run / "config.yaml").write_text("a: [")
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor", str(run)])
    assert stop.value.code == 1
    text = capsys.readouterr().out
    assert (
        "WRONG checkpoints/last.ckpt: its sha256 is not that in last.ckpt.sha256: `illume fit` moves" in text
    )
    assert "ok    checkpoints/step=1.ckpt: step 1, there is no step=1.ckpt.sha256: not verified" in text
    assert "`illume fit` goes on from checkpoints/step=1.ckpt" in text
    assert "step=3.ckpt.77.writing was never finished" in text
    assert "step=0.ckpt.damaged was moved aside" in text
    assert "WRONG config.yaml can't be read" in text
    os.truncate(checkpoints / "step=1.ckpt", 0)
    text, is_well = check_run(run)
    assert not is_well and "WRONG " + str(checkpoints) + " has no checkpoint that is whole" in text


def test_what_can_not_be_loaded_and_folders_of_fsdp2(run: Path) -> None:
    torch.save({"global_step": Path()}, run / "checkpoints" / "step=3.ckpt")
    (run / "checkpoints" / "step=4.ckpt").mkdir()
    text, _ = check_run(run)
    assert "step=3.ckpt holds more than tensors and plain values" in text
    assert "WRONG checkpoints/step=4.ckpt: the folder is no whole checkpoint of FSDP2" in text
    with pytest.raises(FileNotFoundError, match="no folder"):
        check_run(run / "nowhere")


HOLD = """
import os, sys, time
from pathlib import Path
from illume_lightning.folder_lock import locked
with locked(Path(sys.argv[1]), sys.argv[2]):
    child = os.fork()
    if child:
        sys.stdout.write(f"{os.getpid()} {child}\\n")
        sys.stdout.flush()
    time.sleep(60)
"""


def test_a_lock_names_its_holder_and_ends_with_it(run: Path) -> None:
    """A worker that outlives a killed process does not hold the folder."""
    command = [sys.executable, "-c", HOLD, str(run), FIT_LOCK]
    root = Path(__file__).parents[1]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid, worker = map(int, process.stdout.readline().split())
    try:
        assert f"process {pid} on {os.uname().nodename} trains it" in check_run(run)[0]
        with (
            pytest.raises(BlockingIOError, match=f"is being worked on by process {pid} on "),
            locked(run, FIT_LOCK),
        ):
            pass
        with locked(run):  # a schedule's is another
            pass
        process.kill()
        process.wait()
        os.kill(worker, 0)
        with locked(run, FIT_LOCK) as is_held:
            assert is_held
        assert holder(run, FIT_LOCK) is None
    finally:
        os.kill(worker, 9)


def test_without_locks_a_warning_has_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("illume_lightning.folder_lock.fcntl.flock", refuse)
    with locked(tmp_path) as is_held:
        assert not is_held
    assert "can't be locked (No locks available)" in caplog.text
