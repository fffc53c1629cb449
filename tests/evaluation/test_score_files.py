"""Files of an evaluation: what is written is read again, and tables say the same."""

import json
from pathlib import Path

import pytest
from PIL import Image

from illume_lightning.evaluation.scores import Sample, Score, ScoreSheet, Shown, read_scores, save_samples
from illume_lightning.evaluation.tables import latex, markdown

SCORES = (
    Score(
        "understanding", "all", 0.8125, 0.78, 0.84, 512, "share", {"chance": 0.2, "without_picture": 0.305}
    ),
    Score("shapes-112", "psnr", 25.678, 24.0, 27.0, 24, "dB"),
    Score("shapes-112", "pixel_usage", 0.5, 0.5, 0.5, 24, "share"),
)
SAMPLES = (Sample("understanding", "How many?", ("pictures/a.png",), (), None, "2", "3", False),)


def sheet(**changes: object) -> ScoreSheet:
    given = {
        "run": "runs/x", "part": "mllm", "step": 1200, "seed": 0, "checkpoint_sha256": "ab", "date": "2026-01-02",
        "seconds": 1.5, "settings": {"limit": 4, "finished": True}, "scores": SCORES, "samples": SAMPLES,
    }  # fmt: skip
    return ScoreSheet(**{**given, **changes})


def test_a_sheet_comes_back_as_it_was(tmp_path):
    assert read_scores(tmp_path) is None
    sheet().write(tmp_path)
    assert read_scores(tmp_path) == sheet()
    content = json.loads((tmp_path / "scores.json").read_text())
    assert content["version"] == 1
    assert content["scores"][0]["baselines"] == {"chance": 0.2, "without_picture": 0.305}
    assert content["samples"][0]["wanted"] is None
    assert content["identity"] is None and content["commit"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]


def test_sheets_of_earlier_versions_come_back_too(tmp_path):
    sheet(identity="0123", commit="abc-dirty").write(tmp_path)
    content = json.loads((tmp_path / "scores.json").read_text())
    assert (content.pop("identity"), content.pop("commit")) == ("0123", "abc-dirty")
    (tmp_path / "scores.json").write_text(json.dumps(content))
    assert read_scores(tmp_path) == sheet()


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"version": 1}', '{"version": 1, "scores": [{}], "samples": []}']
)
def test_damaged_sheets_are_refused(tmp_path, text):
    (tmp_path / "scores.json").write_text(text)
    with pytest.raises(ValueError, match=r"scores.json is damaged.*--again"):
        read_scores(tmp_path)


def test_another_version_is_refused(tmp_path):
    (tmp_path / "scores.json").write_text('{"version": 9}')
    with pytest.raises(ValueError, match="has version 9, this code reads 1"):
        read_scores(tmp_path)


def test_the_same_evaluation_is_recognised():
    assert sheet().is_of("ab", 0, {"limit": 4, "finished": True})
    assert not sheet().is_of("cd", 0, {"limit": 4, "finished": True})
    assert not sheet().is_of("ab", 1, {"limit": 4, "finished": True})
    assert not sheet().is_of("ab", 0, {"limit": 5, "finished": True})


def test_tables():
    lines = markdown(sheet()).splitlines()
    assert lines[0] == "runs/x (mllm), step 1,200"
    row = "| understanding | all | 81.2 % | 78.0 to 84.0 | 512 | chance 20.0, without picture 30.5 |"
    assert lines[4] == row
    assert lines[5] == "| shapes-112 | psnr | 25.68 dB | 24.00 to 27.00 | 24 |  |"
    assert lines[6] == "| shapes-112 | pixel_usage | 50.0 % |  | 24 |  |"
    assert markdown(sheet(settings={"finished": False})).startswith("runs/x (mllm), step 1,200, unfinished\n")
    tex = latex(sheet())
    assert r"understanding & all & 81.2 \% & 78.0 to 84.0 & 512 & chance 20.0, without picture 30.5 \\" in tex
    assert r" & pixel\_usage & 50.0 \% &  & 24 &  \\" in tex
    assert tex.count(r"\midrule") == 2
    assert tex.strip().endswith(r"\end{tabular}")


def test_pictures_of_samples_are_numbered_within_their_task(tmp_path):
    red, blue = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    shown = [
        Shown("editing", "first", (red,), (blue,), red),
        Shown("text", "?", answer="a", expected="b", right=False),
        Shown("editing", "second", (blue,), (red,), blue, right=True),
    ]
    first, words, second = save_samples(shown, tmp_path)
    assert first.given == ("pictures/editing-0-given-0.png",)
    assert second.made == ("pictures/editing-1-made-0.png",)
    assert second.wanted == "pictures/editing-1-wanted.png"
    assert words == Sample("text", "?", answer="a", expected="b", right=False)
    files = {path.relative_to(tmp_path) for path in tmp_path.rglob("*.png")}
    assert len(files) == 6
    with Image.open(tmp_path / Path(second.made[0])) as image:
        assert image.getpixel((0, 0)) == (255, 0, 0)
