"""What README and docs say was measured is what the committed records say."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import figures

ROOT = Path(__file__).parents[1]

# A number and a unit of something measured. Pixels, cores and steps are settings.
QUANTITY = re.compile(
    r"(?<![\w.])\d[\d,]*(?:\.\d+)?"
    r"(?: ?(?:%|dB|[KMGT]i?B|ms|s|min|h|seconds?|minutes?|hours?|days?|FLOPs?)(?!\w)|x (?=\w+er\b))"
)
NOT_MEASURED = {
    "under 12 minutes on 2 cores": "the limit that the suite is kept under",
    "fits within 20 % are dropped": "the paper's rule of cropping",
    "again with 10 % of them wrong": "a setting of the validation",
}


@pytest.mark.parametrize("page", figures.PAGES)
def test_figures_are_what_the_records_say(page: str) -> None:
    text = (ROOT / page).read_text()
    assert "<!-- figures:" in text
    assert figures.rewrite(text) == text, "`make figures` writes them"


def test_readme_says_nothing_else_was_measured() -> None:
    """A number with a unit stands among the figures, or here with the reason why it is none."""
    text = " ".join(figures.without_figures((ROOT / "README.md").read_text()).split())
    for exception in NOT_MEASURED:
        assert exception in text, f"{exception!r} is not in README any more"
        text = text.replace(exception, "")
    assert QUANTITY.findall(text) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("29.0 dB", True), ("it takes 3 h", True), ("94 % of", True), ("1,234 GiB", True), ("2.5x faster", True),
        ("in 30 s.", True), ("256 px", False), ("2 cores", False), ("98k codes", False), ("fp32 s", False),
    ],
)  # fmt: skip
def test_what_counts_as_measured(text: str, found: bool) -> None:
    assert bool(QUANTITY.search(text)) == found


def test_every_block_is_used_and_unknown_ones_are_refused() -> None:
    text = "".join((ROOT / page).read_text() for page in figures.PAGES)
    assert sorted(re.findall(r"<!-- figures: (\w+) -->", text)) == sorted(figures.BLOCKS)
    assert text.count("<!-- figures:") == text.count("<!-- /figures -->")
    with pytest.raises(ValueError, match="no figures are called 'made_up': there are demo, "):
        figures.rewrite("<!-- figures: made_up -->\n99 %\n<!-- /figures -->")


def test_a_changed_record_changes_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    text, read = (ROOT / "README.md").read_text(), figures.record
    monkeypatch.setattr(
        figures, "record", lambda name: read(name) | ({"speedup": 9.87} if name == "simvq" else {})
    )
    assert "9.9x faster than blockwise" in figures.rewrite(text)
    other = {"cores": 64, "cpu": "other", "capability": "AVX2", "accelerator": None}
    monkeypatch.setattr(
        figures, "record", lambda name: read(name) | ({"hardware": other} if name == "simvq" else {})
    )
    with pytest.raises(ValueError, match="of several machines: 2 cores .*, 64 cores"):
        figures.rewrite(text)


def test_claims_are_a_table_once_there_are_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    assert "so no table stands here" in figures.claims()
    for run, seed, value in (("generation", 0, 0.5), ("generation", 1, 0.75), ("pixel_first", 0, 0.25)):
        found = {"task": "generation", "name": "scene", "value": value, "unit": "share"}
        sheet = {"version": 1, "part": "mllm", "step": 500, "settings": {"run_seed": seed}, "scores": [found]}
        path = tmp_path / "claims" / run / f"seed{seed}" / "scores.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(sheet | {"samples": []}))
    machine = {"cores": 2, "cpu": "some", "capability": "AVX2", "accelerator": None}
    about = {"command": "illume schedule x", "date": "2026-01-02", "commit": "abc", "hardware": machine}
    (tmp_path / "claims/measured.json").write_text(json.dumps(about))
    text = figures.claims().replace("\u00a0", " ")
    head = "`illume schedule x`, on 2 cores (some, AVX2, no GPU), 2026-01-02, commit abc."
    assert text.startswith(f"{head}\n\n## Order of tokens, guidance\n\nmllm, mean")
    assert "Continuous input" not in text, "it has no results"
    assert "| task | score | generation (n = 2) | pixel_first (n = 1) |" in text
    assert "| generation | scene | 62.5 ± 17.7 % | 25.0 % |" in text


def test_records_name_command_hardware_date_and_commit() -> None:
    """Of all that README's figures are made of."""
    used = {*figures.RESULTS.glob("*.json"), *(figures.RESULTS / "demo").rglob("measured.json")}
    used |= {figures.RESULTS / "demo" / name for name in ("emoji.json", "decoder.json")}
    assert len(used) > 9
    for path in used:
        found = figures.record(str(path.relative_to(figures.RESULTS).with_suffix("")))
        assert {"command", "hardware", "date", "commit"} <= set(found), path
        assert {"cpu", "cores", "accelerator"} <= set(found["hardware"]), path
