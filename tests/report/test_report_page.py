"""The page as a whole: what it says, what it needs, and what it does with gaps."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="curves need matplotlib: pip install 'illume-lightning[report]'")

from toy_records import PROMPT, STATE, sample, score, write_json, write_scores

import cli
from illume_lightning.report.page import write_report

REPO = Path(__file__).parents[2]
VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """What stands in a page: whether tags are balanced, text, attributes that refer to something, and names."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text, self.references, self.ids = "", list[str](), list[str]()
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href"):
                self.references.append(value or "")
            if name == "id":
                self.ids.append(value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.text += " "

    def handle_data(self, data: str) -> None:
        self.text += data if not self.open or self.open[-1] != "style" else ""


def write(folder: Path) -> tuple[str, Page, str]:
    """HTML as text and as a page, and Markdown."""
    html, markdown = write_report(folder)
    return html.read_text(), Page(html.read_text()), markdown.read_text()


def plain(text: str) -> str:
    return " ".join(text.replace("\u00a0", " ").split())


def test_the_page_needs_nothing_beside_it_and_says_everything(folder: Path) -> None:
    source, page, _ = write(folder)
    assert all(reference.startswith(("data:image/", "#")) for reference in page.references)
    assert not {"script", "link", "iframe"} & page.tags
    assert {"svg", "img", "table", "details"} <= page.tags
    assert len(page.ids) == len(set(page.ids))
    assert {reference[1:] for reference in page.references if reference[0] == "#"} <= set(page.ids)
    assert "prefers-color-scheme: dark" in source and "http" not in re.sub(r"http-equiv|xmlns\S*", "", source)
    text = plain(page.text)
    assert "ILLUME+ on toys" in text and "Seed 3 · 2026-11-23 · 10 min 30 s in all" in text
    assert "steps finished" not in text
    for shown in ("25.00 dB", "50.0 %", "75.0 %", "40.0 %", "80.0 %", "30.0 %"):
        assert shown in text
    assert "95 %: 70.0 to 80.0, n = 64 chance 25.0 %, without picture 30.0 %" in text
    assert "99 % ILLUME+ 3B: GenEval, single object, Table 3" in text
    assert "87.6 % ILLUME+ 3B: POPE, Table 2" in text
    assert "two expected: three ✗ wrong" in text
    assert "illume fit -c dualvitok.yaml" in text and "01234567" in text
    assert "class_path: illume_lightning.lit.MLLMStage2" in text


def test_texts_of_users_stay_texts(folder: Path) -> None:
    source, page, markdown = write(folder)
    assert PROMPT in plain(page.text)
    assert "<script" not in source and "<script" not in markdown
    row = next(line for line in markdown.splitlines() if "alert" in line)
    assert r"a \| red &amp; \*\*blue\*\* star" in row
    assert len(re.findall(r"(?<!\\)\|", row)) == 5


def test_markdown_links_to_pictures_where_they_lie(folder: Path, tmp_path: Path) -> None:
    _, markdown = write_report(folder, tmp_path / "elsewhere" / "deep")
    links = re.findall(r"!\[[^]]*\]\(([^)]+)\)", markdown.read_text())
    assert len(links) == 3
    assert all((markdown.parent / link).is_file() for link in links)
    assert not any(link.startswith("/") for link in links)


def test_equal_records_give_equal_reports(folder: Path) -> None:
    assert write(folder)[0::2] == write(folder)[0::2]


def test_stages_follow_one_another_with_their_phases_marked(folder: Path) -> None:
    text = plain(write(folder)[1].text)
    assert "1-1: 32 px; 1-2: any resolution up to 64 px; 2-1: 32 px" in text
    assert "1: 32 px; 2: any resolution up to 64 px" in text


def test_codebooks_come_from_scores(folder: Path) -> None:
    _, page, markdown = write(folder)
    assert "Toys, evaluated 75.0 % 31.00" in plain(page.text)
    assert "with SimVQ 100 %" in plain(page.text)
    assert "| Toys, evaluated | 75.0" in markdown


def test_what_is_missing_is_named_with_its_command(folder: Path, root: Path) -> None:
    state = json.loads((root / STATE).read_text())
    for step in state["steps"]:
        if step["name"] in ("mllm_stage3", "evaluate_mllm_stage3"):
            step |= {"state": "waiting", "started": "", "seconds": 0.0}
    write_json(root / STATE, state)
    (root / "runs/toys/mllm_stage3").rename(root / "away")
    _, page, markdown = write(folder)
    for text in (plain(page.text), markdown.replace("\\", "").replace("`", "")):
        assert "5 of 7 steps finished" in text
        assert "MLLM, stage 3 has not been trained yet." in text
        assert "illume fit -c mllm_stage3.yaml" in text
    assert plain(page.text).count("not evaluated yet") == 4
    (root / "away").rename(root / "runs/toys/mllm_stage3")
    (root / "runs/toys/mllm_stage3/seed3/scores/scores.json").unlink()
    text = plain(write(folder)[1].text)
    assert (
        "runs/toys/mllm_stage3/seed3 has not been evaluated. To get it: illume evaluate runs/toys/mll" in text
    )


def test_no_runs_at_all(folder: Path, root: Path) -> None:
    (root / "runs/toys/schedule").rename(root / "kept")
    for path in (root / "runs/toys").iterdir():
        path.rename(root / f"away-{path.name}")
    (root / "kept").rename(root / "runs/toys/schedule")
    text = plain(write(folder)[1].text)
    assert text.count("has not been trained yet") >= 4
    assert "No run of this schedule" not in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"version": 1, "sc', "is not readable JSON"),
        ("[1]", "holds list, not an object"),
        ('{"version": 2}', "is of version 2 and this installation reads up to 1: update illume-lightning"),
        ('{"version": "1"}', "says version '1', not 1"),
        ('{"version": 1, "step": 4, "scores": [{"task": 3}], "samples": []}', "'task' is '3', not a text"),
        ('{"version": 1, "step": 4, "scores": [4], "samples": []}', "scores[0] is '4', not an object"),
        ('{"version": 1, "step": true}', "'step' is 'True', not a whole number"),
    ],
)
def test_scores_that_cannot_be_read_are_noted(folder: Path, root: Path, content: str, message: str) -> None:
    (root / "runs/toys/mllm_stage3/seed3/scores/scores.json").write_text(content)
    text = plain(write(folder)[1].text)
    assert message in text
    assert "illume evaluate runs/toys/mllm_stage3/seed3" in text
    assert "25.00 dB" in text


def test_pictures_that_cannot_be_shown_are_noted(folder: Path, root: Path) -> None:
    (root / "secret.png").write_bytes(b"secret")
    made = ["pictures/gone.png", "pictures/broken.png", "../../secret.png", str(root / "secret.png")]
    file = write_scores(root, "mllm_stage3", [], [sample("generation", made=made, right=None)])
    (file.parent / "pictures" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    _, page, markdown = write(folder)
    for text in (page.text, markdown.replace("\\", "")):
        assert "pictures/gone.png is missing" in text
        assert "pictures/broken.png is not a readable picture" in text
        assert text.count(f"lies outside {file.parent}") == 2


def test_values_that_are_no_numbers_are_left_open(folder: Path, root: Path) -> None:
    scores = [score("understanding", "all", float("nan")), score("generation", "scene", None)]
    write_scores(root, "mllm_stage3", scores, [])
    _, page, _ = write(folder)
    assert "nan" not in page.text.lower()
    assert "Understanding – questions answered right" in plain(page.text)  # noqa: RUF001


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "give the folder of a schedule, such as runs/shapes/schedule/seed0"),
        ("{", "is not readable JSON"),
        ({"version": 9}, "is of version 9 and this installation reads up to 1: update illume-lightning"),
        ({"steps": "none"}, "'steps' is 'none', not a list"),
        ({"steps": [{"name": "x"}]}, "'output' is 'None', not a text"),
        ({"seed": "a"}, "'seed' is 'a', not a whole number"),
    ],
)
def test_a_state_that_cannot_be_read_is_one_line(
    folder: Path, root: Path, change: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    state = root / STATE
    if change is None:
        state.unlink()
    else:
        state.write_text(
            change if isinstance(change, str) else json.dumps(json.loads(state.read_text()) | change)
        )
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", str(folder)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and str(state) in error and error.count("\n") == 1


def test_the_command_writes_both_and_needs_no_torch(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys, cli\ncli.main(sys.argv[1:])\n"
        "assert not {'torch', 'lightning', 'litdata'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, "report", str(folder), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = [str(tmp_path / "out" / name) for name in ("report.html", "report.md")]
    assert done.stdout.splitlines() == written
    assert sorted(map(str, (tmp_path / "out").iterdir())) == written


def test_without_matplotlib_the_way_to_get_it_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        cli.main(["report", str(folder)])
    assert "pip install 'illume-lightning[report]'" in capsys.readouterr().err
