"""Benchmarks that need a device, or a quiet machine, run as toys and refuse what can't be."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu
from benchmarks.steps import Clock, MadeUpData, picture_batch

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def start(*command: str) -> subprocess.CompletedProcess[str]:
    """One thread, as everything here."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, *command]
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=240)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cuda"])
    with pytest.raises(SystemExit, match=r"^--device cuda: torch finds no GPU here; .* --size toy") as caught:
        gpu.main()
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("benchmark", "options", "printed"),
    [
        ("gpu.py", ("--device", "cpu"), ("| dualvitok, 32 px, batch 4 |", "compile |", "| batch 32 |")),
        ("modules.py", ("--rounds", "1", "--steps", "2", "--threads", "1"), ("mllm_stage2 ", "target 1.05")),
        ("ddp.py", ("--rounds", "1", "--steps", "2"), ("mllm_stage2 ", "speed-up")),
        ("checkpoints.py", ("--rounds", "1"), ("ours, no hash", "dualvitok ", "computed: share")),
        (
            "determinism.py",
            ("--rounds", "2", "--steps", "2", "--threads", "1"),
            ("dualvitok    warn", "mllm_stage2  true", "bit for bit"),
        ),
    ],
)
def test_a_toy_runs_and_writes_nothing(benchmark, options, printed):
    before = sorted(RESULTS.iterdir())
    done = start(f"benchmarks/{benchmark}", "--size", "toy", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    for words in printed:
        assert words in done.stdout, done.stdout
    assert "error" not in done.stdout.lower() and "out of" not in done.stdout
    assert sorted(RESULTS.iterdir()) == before


def test_what_fails_is_recorded_and_the_rest_goes_on():
    def fail(error: Exception) -> dict:
        raise error

    assert gpu.attempt(lambda: fail(torch.OutOfMemoryError("...")), 5) == {"error": "out of memory"}
    assert gpu.attempt(lambda: fail(RuntimeError("no kernel\nfor this")), 5) == {
        "error": "RuntimeError: no kernel"
    }
    assert gpu.attempt(lambda: {"seconds": 1.0}, 5) == {"seconds": 1.0}
    assert gpu.attempt(lambda: {"seconds": 1.0}, 0.5)["error"] == "TimeoutError: no time was left"

    def forever() -> dict:
        while True:
            torch.ones(1)

    assert gpu.attempt(forever, 1.1)["error"] == "TimeoutError: took longer than 1 s"


def test_tables_show_figures_and_errors():
    results = {
        "training": {
            "a": {"images_per_s": 12.345, "seconds": 0.5, "mfu": 0.4, "peak_gib": None},
            "b": {"error": "x"},
        },
        "options": {"a": {"TF32": {"speed_up": 1.5, "peak_gib": 3.0}}},
        "generation": {"batch 1": {"tokens_per_s": 100.0, "s_per_image": 2.0}},
    }
    text = gpu.markdown(results)
    assert "| a | 12.3 |  | 0.5 | 0.4 |  |" in text
    assert "| b | x |  |  |  |  |" in text
    assert "| a: TF32 | 1.5 | 3 |" in text
    assert "| batch 1 | 100 | 2 |  |" in text


@pytest.mark.parametrize(
    ("name", "tflops"),
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA T4", None)],
)
def test_the_sheet_of_a_device(monkeypatch, name, tflops):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: name)
    found = gpu.peak_speed("cuda")
    assert found == (tflops and tflops * 1e12)
    assert gpu.peak_speed("cpu") is None


def test_the_clock_leaves_the_first_steps_out(monkeypatch):
    times = iter([10.0, 16.0])
    monkeypatch.setattr("benchmarks.steps.time.perf_counter", lambda: next(times))
    clock = Clock(warmup=2, counted=2)
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")))
    weight = torch.ones(4, 5)
    for _ in range(5):
        clock.on_train_batch_start(trainer)
        torch.ones(3, 4) @ weight
        clock.on_train_batch_end(trainer)
    clock.on_train_end(trainer)
    assert clock.seconds == 2.0
    assert clock.flops == 2 * 3 * 4 * 5


def test_made_up_batches_come_in_turns():
    one, other = (picture_batch(2, (32, 48), seed) for seed in (0, 1))
    assert one.images.shape == (2, 3, 32, 48) and not torch.equal(one.images, other.images)
    loader = MadeUpData([one, other], 5).train_dataloader()
    assert [batch is one for batch in loader] == [True, False, True, False, True]
