"""Records of schedules and runs as the other commands would have written them."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

PROMPT = '<script>alert("x")</script> a | red & **blue** star'
STATE = "runs/toys/schedule/seed3/state.json"
FITS = ("dualvitok", "mllm_stage1", "mllm_stage2", "mllm_stage3")


def step(name: str, command: str, output: str, **more: Any) -> dict[str, Any]:
    """An entry of state.json."""
    entry = {"name": name, "command": command.split(), "output": output, "state": "finished"}
    entry |= {
        "fingerprint": "0123456789abcdef",
        "output_sha256": "ff",
        "started": "2026-11-20T08:00:00+00:00",
    }
    return entry | {"seconds": 90.0, "restarts": 0} | more


def score(task: str, name: str, value: Any, unit: str = "share", **baselines: float) -> dict[str, Any]:
    """An entry of scores.json, with an interval of 0.05 to both sides."""
    limits = {"low": value - 0.05, "high": value + 0.05} if isinstance(value, float) else {}
    return {
        "task": task,
        "name": name,
        "value": value,
        "n": 64,
        "unit": unit,
        "baselines": baselines,
    } | limits


def sample(task: str, **more: Any) -> dict[str, Any]:
    """A sample of scores.json."""
    nothing = {"given": [], "made": [], "wanted": None, "answer": None, "expected": None, "right": None}
    return {"task": task, "prompt": "a star"} | nothing | more


def write_json(path: Path, content: Any) -> None:
    """Write a record with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_run(run: Path, part: str, number: int) -> None:
    """A run of two phases that logged every tenth of its 40 steps."""
    class_name = "MLLMStage" + part[-1] if part.startswith("mllm") else "DualViTokModule"
    phases = "curriculum: {phases: [{mode: fixed, side: 32}, {mode: any_resolution, side: 64}]}\n"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(f"model: {{class_path: illume_lightning.lit.{class_name}}}\n{phases}")
    names = ["train/pixel_loss", "train/semantic_loss"]
    if part.startswith("mllm"):
        names = ["train/loss", "train/generation/semantic_loss", "train/understanding/text_loss"]
    rows = [",".join(["step", "curriculum/phase", "curriculum/side", *names])]
    for at in (9, 19, 29, 39):
        phase = int(at > 20)
        rows.append(
            ",".join(map(str, [at, float(phase), 32.0 * (phase + 1), *(1 / (at + 1) for _ in names)]))
        )
    version = run / "metrics" / "version_0"
    version.mkdir(parents=True)
    (version / "metrics.csv").write_text("\n".join(rows) + "\n")


def write_scores(root: Path, part: str, scores: list[Any], samples: list[Any], **more: Any) -> Path:
    """A run's scores, with two pictures; returns the file."""
    folder = root / f"runs/toys/{part}/seed3/scores"
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (8, 6), colour).save(folder / "pictures" / f"{name}.png")
    content = {"version": 1, "run": part, "part": part, "step": 40, "seed": 0, "checkpoint_sha256": "aa"}
    content |= {"date": "2026-11-23", "seconds": 5.0, "settings": {}, "scores": scores, "samples": samples}
    write_json(folder / "scores.json", content | more)
    return folder / "scores.json"
