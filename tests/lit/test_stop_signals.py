"""Runs that are told to end, by real signals."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException
from stopped_run import fit

from illume_lightning.lit.durable_checkpoints import BackgroundCheckpointIO, DurableCheckpointIO

ROOT = Path(__file__).parents[2]


class Signal(L.Callback):
    """Sends this process a signal in the first of a step's two batches."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step and batch_idx % 2 == 0:
            os.kill(os.getpid(), self.number)


def saved(folder: Path) -> tuple[int, float]:
    content = torch.load(folder / "last.ckpt", weights_only=True)
    return content["global_step"], float(content["state_dict"]["weight"])


@pytest.mark.parametrize("plugin", [DurableCheckpointIO, BackgroundCheckpointIO])
def test_the_step_in_progress_is_finished_and_saved(tmp_path, plugin):
    from callbacks import Checkpoint

    before = signal.getsignal(signal.SIGTERM)
    checkpoint = Checkpoint(tmp_path, "{step}", every_n_train_steps=100, save_top_k=1, save_last=True)
    with pytest.raises(SIGTERMException):
        fit(tmp_path, 9, callbacks=[Signal(4, signal.SIGTERM), checkpoint], plugins=[plugin()])
    assert saved(tmp_path) == (5, 5.0)
    assert (tmp_path / "last.ckpt").samefile(tmp_path / "step=5.ckpt")
    assert signal.getsignal(signal.SIGTERM) == before
    fit(tmp_path, 9)
    assert saved(tmp_path) == (9, 9.0)


def test_a_signal_in_the_last_step_does_not_count_it_twice(tmp_path):
    from callbacks import Checkpoint

    checkpoint = Checkpoint(tmp_path, "{step}", every_n_train_steps=100, save_top_k=1, save_last=True)
    with pytest.raises(SIGTERMException):
        fit(tmp_path, 5, callbacks=[Signal(4, signal.SIGTERM), checkpoint])
    fit(tmp_path, 5)
    assert saved(tmp_path) == (5, 5.0)


def test_slurm_gets_the_job_back_after_the_step(tmp_path, monkeypatch):
    from callbacks import Checkpoint

    calls = tmp_path / "calls"
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\nls {tmp_path}/run > {calls}; echo "$@" >> {calls}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    for name, value in {"NTASKS": 1, "PROCID": 0, "LOCALID": 0, "NODEID": 0, "JOB_ID": 77}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    run = tmp_path / "run"
    checkpoint = Checkpoint(run, "{step}", every_n_train_steps=100, save_top_k=1, save_last=True)
    plugins = [SLURMEnvironment(), DurableCheckpointIO()]
    with pytest.raises(SIGTERMException):
        fit(run, 9, callbacks=[Signal(2, signal.SIGUSR1), checkpoint], plugins=plugins)
    assert saved(run) == (3, 3.0)
    assert calls.read_text().split("\n")[:-1] == [*sorted(os.listdir(run)), "requeue 77"], "after it is saved"
    assert not list(tmp_path.rglob("hpc_ckpt*"))
    monkeypatch.delenv("SLURM_NTASKS")
    fit(run, 9)
    assert saved(run) == (9, 9.0)


def start(folder: Path, seconds: float) -> subprocess.Popen[str]:
    """A process that is in its third step."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(ROOT / "tests/stopped_run.py"),
        str(folder),
        "50",
        str(seconds),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("batch") and "of step 2" in line:
            return process
    raise AssertionError(process.communicate()[1])


def test_a_process_saves_and_goes_on_and_a_second_signal_ends_it_at_once(tmp_path):
    process = start(tmp_path / "first", 0.4)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, "Lightning's own status; `illume fit` makes it 143"
    assert "SIGTERM: ending after this training step" in errors
    assert "of step 3" not in output
    assert saved(tmp_path / "first") == (3, 3.0)
    process = start(tmp_path / "second", 120.0)
    process.send_signal(signal.SIGTERM)
    threading.Timer(0.5, process.send_signal, [signal.SIGTERM]).start()
    began = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM and time.monotonic() - began < 30
    assert not (tmp_path / "second").exists()
