"""A small schedule's folder."""

from pathlib import Path

import pytest
from toy_records import FITS, PROMPT, STATE, sample, score, step, write_json, write_run, write_scores


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Folder that holds ``runs`` with a finished schedule of four fits, of which two are evaluated."""
    steps = [step("data", "prepare shapes data/toys", "data/toys", started="2026-11-19T23:00:00+00:00")]
    steps += [step(part, f"fit -c {part}.yaml", f"runs/toys/{part}/seed3", restarts=1) for part in FITS]
    steps += [
        step(f"evaluate_{part}", f"evaluate runs/toys/{part}/seed3", f"runs/toys/{part}/seed3/scores")
        for part in ("dualvitok", "mllm_stage3")
    ]
    steps.append(
        step("report", "report runs/toys/schedule/seed3", "report.html", state="running", seconds=1e6)
    )
    write_json(tmp_path / STATE, {"version": 1, "world": "toys", "seed": 3, "steps": steps})
    for number, part in enumerate(FITS):
        write_run(tmp_path / f"runs/toys/{part}/seed3", part, number)
    usage = [score("toys", "semantic_usage", 0.75), score("toys", "semantic_perplexity", 31.0, "perplexity")]
    codes = [score("toys", "psnr", 25.0, "dB"), score("toys", "scene", 0.5, originals=1.0), *usage]
    write_scores(tmp_path, "dualvitok", codes, [])
    answers = [
        score("understanding", "all", 0.75, chance=0.25, without_picture=0.3),
        score("understanding", "existence", 0.9, chance=0.5),
        score("generation", "scene", 0.4),
        score("generation", "single_object", 0.8, chance=0.2),
        score("editing", "edit", 0.3),
    ]
    samples = [
        sample("understanding", given=["pictures/a.png"], answer="two", expected="three", right=False),
        sample("generation", prompt=PROMPT, made=["pictures/a.png"], wanted="pictures/b.png", right=True),
    ]
    write_scores(tmp_path, "mllm_stage3", answers, samples)
    return tmp_path


@pytest.fixture
def folder(root: Path) -> Path:
    """The schedule's folder."""
    return (root / STATE).parent
