"""The real command: killed at random instants, the whole chain gives the weights of an uninterrupted one."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

EXPERIMENTS = Path(__file__).parents[2] / "experiments" / "shapes"
NUM_KILLS = 3
STEPS = [
    {
        "name": "pictures",
        "run": 'prepare shapes data/tiny/train --count 48 --sizes "[[112,112]]"',
        "output": "data/tiny/train",
    },
    {
        "name": "held_out",
        "run": 'prepare shapes data/tiny/val --split val --count 8 --sizes "[[112,112]]"',
        "output": "data/tiny/val",
    },
    {
        "name": "encoder",
        "run": "fit -c vision_encoder.yaml",
        "output": "runs/tiny/vision_encoder/seed${seed}",
    },
    {"name": "tokenizer", "run": "fit -c dualvitok.yaml", "output": "runs/tiny/dualvitok/seed${seed}"},
]


def phase(until_step: int) -> dict[str, Any]:
    return {"until_step": until_step, "mode": "fixed", "side": 112, "batch_size": 4, "micro_batch_size": 4}


def write_world(folder: Path) -> Path:
    """The shipped YAML files, made short; paths are relative, so that two folders hold the same."""
    folder.mkdir()
    for name, steps in (("vision_encoder", 12), ("dualvitok", 12)):
        text = (EXPERIMENTS / f"{name}.yaml").read_text().replace("/shapes/", "/tiny/")
        config = yaml.safe_load(text)
        config["trainer"].update(max_steps=steps, val_check_interval=steps, log_every_n_steps=1)
        for callback in config["trainer"]["callbacks"]:
            if callback["class_path"] == "callbacks.Checkpoint":
                callback["init_args"]["every_n_train_steps"] = 3
        config["curriculum"]["phases"] = [phase(steps)]
        config["data"]["init_args"].update(
            train=[{"path": "data/tiny/train"}], val={"shapes": "data/tiny/val"}, num_workers=0, val_limit=8
        )
        if name == "dualvitok":
            config["data"]["init_args"].update(val_sizes=[112], val_any_resolution=None)
            init = config["model"]["init_args"]
            init["codebook_start"] = {**init["codebook_start"], "steps": 4, "batches": 2}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    (folder / "schedule.yaml").write_text(yaml.safe_dump({"world": "tiny", "steps": STEPS}))
    return folder


def start(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cli", "schedule", "schedule.yaml", "--seed", "3"]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def weights(folder: Path, run: str) -> dict[str, torch.Tensor]:
    file = folder / f"runs/tiny/{run}/seed3/checkpoints/last.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    assert checkpoint["global_step"] == 12
    return checkpoint["state_dict"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_killed_schedule_trains_the_same_weights(tmp_path: Path) -> None:
    straight, killed = write_world(tmp_path / "straight"), write_world(tmp_path / "killed")
    began = time.monotonic()
    process = start(straight)
    printed, _ = process.communicate(timeout=900)
    assert process.returncode == 0, printed
    whole = time.monotonic() - began
    moments, num_killed = random.Random(0), 0
    for _ in range(NUM_KILLS):
        process = start(killed)
        try:
            process.wait(moments.uniform(0.2, 0.4) * whole)
        except subprocess.TimeoutExpired:
            process.kill()
            num_killed += 1
        process.communicate()
    process = start(killed)
    printed, _ = process.communicate(timeout=900)
    assert process.returncode == 0, printed
    assert num_killed == NUM_KILLS
    for run in ("vision_encoder", "dualvitok"):
        expected, found = weights(straight, run), weights(killed, run)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), (run, name)
    state = json.loads((killed / "runs/tiny/schedule/seed3/state.json").read_text())
    assert sum(step["restarts"] for step in state["steps"]) > 0
