"""Checkpoint files through kills, full disks and damage; and which one a run goes on from."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from illume_lightning import durable_file
from illume_lightning.lit.durable_checkpoints import (
    BackgroundCheckpointIO,
    DurableCheckpointIO,
    go_on_from,
    num_bytes,
    remove_leftovers,
)
from illume_lightning.nn.checkpoints import read_state_dict
from illume_lightning.nn.whole_checkpoint import choose, damage, newest_first, require_whole

ROOT = Path(__file__).parents[2]
IO = DurableCheckpointIO()


def checkpoint(step: int, size: int = 1000) -> dict:
    return {"global_step": step, "state_dict": {"model.weight": torch.full((size,), float(step))}}


def save(folder: Path, *steps: int) -> None:
    """As a run does: each step's file, and last.ckpt."""
    for step in steps:
        IO.save_checkpoint(checkpoint(step), folder / f"step={step}.ckpt")
        IO.link_checkpoint(folder / f"step={step}.ckpt", folder / "last.ckpt")


def flip(path: Path, place: float = 0.5) -> None:
    """Turn one bit, and write it as a disk would: under every name of the file."""
    with path.open("r+b") as file:
        file.seek(int(path.stat().st_size * place))
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- writing --


def test_the_sum_is_one_that_sha256sum_reads(tmp_path):
    save(tmp_path, 5)
    assert names(tmp_path) == ["last.ckpt", "last.ckpt.sha256", "step=5.ckpt", "step=5.ckpt.sha256"]
    assert (tmp_path / "last.ckpt").samefile(tmp_path / "step=5.ckpt")
    for name in ("last.ckpt", "step=5.ckpt"):
        done = subprocess.run(
            ["sha256sum", "-c", f"{name}.sha256"], cwd=tmp_path, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (0, f"{name}: OK\n")
    loaded = IO.load_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    assert loaded["global_step"] == 5 and torch.equal(
        loaded["state_dict"]["model.weight"], torch.full((1000,), 5.0)
    )


def test_removing_takes_the_sum_along_and_leaves_the_other_name(tmp_path):
    save(tmp_path, 5)
    IO.remove_checkpoint(tmp_path / "step=5.ckpt")
    assert names(tmp_path) == ["last.ckpt", "last.ckpt.sha256"]
    assert not damage(tmp_path / "last.ckpt")


def test_linking_twice_leaves_nothing_behind(tmp_path):
    save(tmp_path, 5)
    IO.link_checkpoint(tmp_path / "step=5.ckpt", tmp_path / "last.ckpt")
    assert len(names(tmp_path)) == 4


def test_without_links_it_is_a_copy(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    save(tmp_path, 5, 6)
    assert not (tmp_path / "last.ckpt").samefile(tmp_path / "step=6.ckpt")
    assert (tmp_path / "last.ckpt").read_bytes() == (tmp_path / "step=6.ckpt").read_bytes()
    assert choose(tmp_path).checkpoint == tmp_path / "last.ckpt" and len(names(tmp_path)) == 6


@pytest.mark.parametrize("instant", range(8))
def test_file_and_sum_never_contradict_one_another(tmp_path, monkeypatch, instant):
    """Stopped before any system call that changes a name, and what is on the disk then is looked at."""
    save(tmp_path, 1)
    seen = 0

    def stop(call):
        def instead(*arguments, **options):
            nonlocal seen
            seen += 1
            if seen == instant + 1:
                raise KeyboardInterrupt
            return call(*arguments, **options)

        return instead

    with monkeypatch.context() as patch:
        for name in ("replace", "link", "unlink"):
            patch.setattr(os, name, stop(getattr(os, name)))
        with suppress(KeyboardInterrupt):
            save(tmp_path, 2)
    for path in newest_first(tmp_path):
        assert not damage(path), path
    last = choose(tmp_path).checkpoint
    assert last is not None and torch.load(last, weights_only=True)["global_step"] in (1, 2)
    assert (tmp_path / "step=1.ckpt").exists()


KILLED = """
import sys, torch
from pathlib import Path
from illume_lightning import durable_file
folder, step = Path(sys.argv[1]), 0
while True:
    step += 1
    path = folder / f"step={step}.ckpt"
    with durable_file.replacing(path) as file:
        torch.save({"global_step": step, "weight": torch.full((300_000,), float(step))}, file)
    durable_file.link(path, folder / "last.ckpt")
    durable_file.remove(folder / f"step={step - 2}.ckpt")
"""


def test_killed_while_writing_there_is_always_a_good_one(tmp_path):
    """A process that does nothing but write is killed at 12 instants, none of which was chosen."""
    found = set()
    for number in range(12):
        for path in tmp_path.iterdir():
            path.unlink()
        # Forked, not started anew: importing torch takes seconds.
        child = os.fork()
        if child == 0:
            sys.argv = ["", str(tmp_path)]
            exec(KILLED, {})
        while not (tmp_path / "step=2.ckpt").exists():
            time.sleep(0.001)
        time.sleep(0.003 * number + 0.0007 * (number % 5))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        choice = choose(tmp_path)
        assert choice.checkpoint is not None and not choice.damaged
        content = torch.load(choice.checkpoint, weights_only=True)
        assert bool((content["weight"] == content["global_step"]).all())
        assert content["global_step"] >= 1
        found.add(len(durable_file.leftovers(tmp_path)))
        remove_leftovers(tmp_path)
        assert not durable_file.leftovers(tmp_path)
    assert 1 in found, "it was never killed while it wrote"


# -- full disks --


def full_disk(monkeypatch, name):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*name, refuse)


@pytest.mark.parametrize("where", ["write", "fsync"])
def test_a_full_disk_is_one_line_and_takes_nothing(tmp_path, monkeypatch, where):
    save(tmp_path, 1)
    before = names(tmp_path)
    with monkeypatch.context() as patch:
        full_disk(patch, (durable_file.HashedFile, "write") if where == "write" else (os, "fsync"))
        with pytest.raises(
            OSError, match=r"step=2.ckpt can't be written \(No space left on device\)"
        ) as caught:
            save(tmp_path, 2)
    assert caught.value.errno == errno.ENOSPC
    assert "takes 4,000 bytes" in str(caught.value) and "bytes, " in str(caught.value)
    assert "\n" not in str(caught.value)
    kept = [name for name in names(tmp_path) if not name.startswith("step=2")]
    assert kept == before and not damage(tmp_path / "last.ckpt") and not durable_file.leftovers(tmp_path)
    save(tmp_path, 2)
    assert torch.load(choose(tmp_path).checkpoint, weights_only=True)["global_step"] == 2


def test_a_disk_that_is_full_in_the_middle_of_a_tensor(tmp_path):
    """The system's own error, after a part was written."""
    save(tmp_path, 1)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
        with pytest.raises(
            OSError, match=r"big.ckpt can't be written \(File too large\): it takes 4,000,000 bytes"
        ):
            IO.save_checkpoint(checkpoint(2, 1_000_000), tmp_path / "big.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert not list(tmp_path.glob("big*")) and not damage(tmp_path / "last.ckpt")


def test_bytes_of_a_checkpoint_count_each_storage_once():
    shared = torch.zeros(10)
    assert num_bytes({"a": [shared, shared[:5]], "b": {"c": torch.zeros(3, dtype=torch.int64)}, "d": 1}) == 64


# -- damage --


def damages(path: Path, how: str) -> None:
    if how == "flipped":
        flip(path)
    elif how == "cut off":
        os.truncate(path, path.stat().st_size // 2)
    elif how == "empty":
        os.truncate(path, 0)
    else:
        flip(path)
        for name in ("last.ckpt", "step=2.ckpt"):
            durable_file.sum_of(path.with_name(name)).unlink()


@pytest.mark.parametrize("how", ["flipped", "cut off", "empty", "flipped, and no sum"])
def test_a_run_goes_on_from_the_last_good_one(tmp_path, caplog, how):
    save(tmp_path, 1, 2)
    damages(tmp_path / "last.ckpt", how)
    trainer = SimpleNamespace(callbacks=[], is_global_zero=True)
    good = go_on_from(trainer, tmp_path)
    assert good == tmp_path / "step=1.ckpt"
    for name in ("last.ckpt", "step=2.ckpt"):
        assert f"{tmp_path / name} is damaged" in caplog.text
    assert f"going on from {good}" in caplog.text
    assert (tmp_path / "last.ckpt").exists(), "until all processes have chosen"
    trainer.callbacks[0].setup(trainer, None, "fit")
    assert not (tmp_path / "last.ckpt").exists() and (tmp_path / "step=2.ckpt.damaged").exists()
    assert choose(tmp_path).checkpoint == good
    save(tmp_path, 2)
    damages(tmp_path / "last.ckpt", how)
    go_on_from(trainer, tmp_path)
    trainer.callbacks[1].setup(trainer, None, "fit")
    assert (tmp_path / "last.ckpt.damaged-2").exists() and (tmp_path / "last.ckpt.damaged").exists()


def test_without_a_good_one_nothing_is_touched(tmp_path):
    save(tmp_path, 1)
    flip(tmp_path / "last.ckpt")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(
        ValueError, match="has no checkpoint that is whole: last.ckpt .*, step=1.ckpt .*begin anew"
    ):
        go_on_from(SimpleNamespace(callbacks=[]), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert choose(tmp_path / "nowhere").checkpoint is None


def test_a_missing_sum_is_no_damage(tmp_path):
    save(tmp_path, 1, 2)
    for path in tmp_path.glob("*.sha256"):
        path.write_text("")
    assert choose(tmp_path).checkpoint == tmp_path / "last.ckpt"
    require_whole(tmp_path / "last.ckpt")


def test_killed_between_the_file_and_its_second_name(tmp_path):
    save(tmp_path, 1)
    time.sleep(0.01)
    IO.save_checkpoint(checkpoint(2), tmp_path / "step=2.ckpt")
    assert choose(tmp_path).checkpoint == tmp_path / "step=2.ckpt"
    IO.link_checkpoint(tmp_path / "step=1.ckpt", tmp_path / "last.ckpt")
    os.utime(tmp_path / "step=2.ckpt", (1, 1))
    assert choose(tmp_path).checkpoint == tmp_path / "last.ckpt", "the user went back to step 1"


def test_steps_are_numbers(tmp_path):
    save(tmp_path, 900, 1000)
    (tmp_path / "last.ckpt").unlink()
    assert [path.name for path in newest_first(tmp_path)] == ["step=1000.ckpt", "step=900.ckpt"]


def test_who_reads_weights_is_told_of_a_good_one(tmp_path):
    save(tmp_path, 1, 2)
    assert float(read_state_dict(tmp_path / "last.ckpt")["model.weight"][0]) == 2.0
    flip(tmp_path / "last.ckpt")
    good = tmp_path / "step=1.ckpt"
    with pytest.raises(
        ValueError, match=f"last.ckpt is damaged: its sha256 .*; {good} .step 1. beside it is whole"
    ):
        read_state_dict(tmp_path / "last.ckpt")
    for path in tmp_path.glob("*.sha256"):
        path.unlink()
    os.truncate(tmp_path / "last.ckpt", 500)
    with pytest.raises(ValueError, match=f"last.ckpt can't be read .*; {good} .step 1. beside it is whole"):
        read_state_dict(tmp_path / "last.ckpt")


# -- in a thread --


def test_in_the_background_everything_keeps_its_order(tmp_path):
    io = BackgroundCheckpointIO()
    content = checkpoint(1)
    io.save_checkpoint(content, tmp_path / "step=1.ckpt")
    io.link_checkpoint(tmp_path / "step=1.ckpt", tmp_path / "last.ckpt")
    content["state_dict"]["model.weight"].fill_(7.0)
    io.save_checkpoint(checkpoint(2), tmp_path / "step=2.ckpt")
    io.link_checkpoint(tmp_path / "step=2.ckpt", tmp_path / "last.ckpt")
    io.remove_checkpoint(tmp_path / "step=0.ckpt")
    io.teardown()
    assert (
        float(torch.load(tmp_path / "step=1.ckpt", weights_only=True)["state_dict"]["model.weight"][0]) == 1.0
    )
    assert (tmp_path / "last.ckpt").samefile(tmp_path / "step=2.ckpt")
    io.save_checkpoint(checkpoint(3), tmp_path / "step=3.ckpt")
    io.finish()
    assert not damage(tmp_path / "step=3.ckpt")


def test_in_the_background_nothing_is_removed_for_a_checkpoint_that_failed(tmp_path, monkeypatch):
    io = BackgroundCheckpointIO()
    io.save_checkpoint(checkpoint(1), tmp_path / "step=1.ckpt")
    io.finish()
    full_disk(monkeypatch, (os, "fsync"))
    io.save_checkpoint(checkpoint(2), tmp_path / "step=2.ckpt")
    io.remove_checkpoint(tmp_path / "step=1.ckpt")
    with pytest.raises(OSError, match="step=2.ckpt can't be written"):
        io.teardown()
    assert not damage(tmp_path / "step=1.ckpt")
