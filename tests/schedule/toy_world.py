"""A world of four steps that a stand-in for `illume` does in a second."""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

TOY = Path(__file__).parent / "toy_illume.py"
PROGRAM = (sys.executable, str(TOY))

ENCODER = "runs/toy/encoder/seed${seed}"
TOKENIZER = "runs/toy/tokenizer/seed${seed}"
STEPS: list[dict[str, Any]] = [
    {"name": "pictures", "run": "prepare data/toy/train 8", "output": "data/toy/train", "minutes": 0.2},
    {"name": "encoder", "run": "fit -c encoder.yaml", "output": ENCODER, "minutes": 6},
    {"name": "tokenizer", "run": "fit -c tokenizer.yaml", "output": TOKENIZER},
    {"name": "scores", "run": ["evaluate", TOKENIZER], "output": f"{TOKENIZER}/scores"},
]
SHARED: list[dict[str, Any]] = [
    STEPS[0],
    {**STEPS[1], "run": "fit -c encoder.yaml --seed_everything 0", "output": "runs/toy/encoder/seed0"},
    *STEPS[2:],
]
"""The same with one encoder for all seeds."""


def write_world(folder: Path, steps: list[dict[str, Any]] = STEPS) -> Path:
    """The schedule's file and the runs' YAML files; returns the folder."""

    def run(name: str, source: str) -> None:
        root = f"runs/toy/{name}/seed${{seed_everything}}"
        config = {"trainer": {"default_root_dir": root}, "inputs": [source], "steps": 25, "rate": 1}
        (folder / f"{name}.yaml").write_text(json.dumps(config))

    folder.mkdir(parents=True, exist_ok=True)
    run("encoder", "data/toy/train/manifest.json")
    run("tokenizer", "runs/toy/encoder/seed${seed_everything}/checkpoints/last.ckpt")
    (folder / "schedule.yaml").write_text(yaml.safe_dump({"world": "toy", "steps": steps}))
    return folder


def write_shared_world(folder: Path) -> Path:
    """A world whose seeds share pictures and encoder; returns the folder."""
    write_world(folder, SHARED)
    edit(folder / "encoder.yaml", steps=12)
    edit(folder / "tokenizer.yaml", steps=12, inputs=["runs/toy/encoder/seed0/checkpoints/last.ckpt"])
    return folder


def journal(folder: Path) -> list[str]:
    """What was started and ended."""
    path = folder / "journal"
    return path.read_text().splitlines() if path.is_file() else []


def state(folder: Path, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Entries of the steps, by name."""
    content = json.loads((folder / f"runs/toy/schedule/seed{seed}/state.json").read_text())
    assert content["version"] == 1 and content["world"] == "toy" and content["seed"] == seed
    return {entry["name"]: entry for entry in content["steps"]}


def outputs(folder: Path) -> dict[str, bytes]:
    """Everything that the steps made."""
    files = [*(folder / "data").rglob("*"), *(folder / "runs").rglob("*")]
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(files)
        if path.is_file() and "schedule" not in path.parts
    }


def edit(path: Path, **values: Any) -> None:
    """Change entries of a run's YAML file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
