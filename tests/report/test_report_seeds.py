"""Tables of mean and standard deviation over seeds."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from toy_records import score, write_json

import cli
from illume_lightning.report.seed_tables import as_csv, latex, markdown, write_seeds
from illume_lightning.report.seeds import compare

STORES = {"understanding": {"path": "data/toys/test", "fingerprint": "f00d"}}


def evaluated(root: Path, run: str, seed: int, *values: float, **more: Any) -> Path:
    """A run's scores: of questions, and of pictures where there are two values; returns the run's folder."""
    scores = [score("understanding", "existence", values[0])]
    scores += [score("generation", "tower_distance", value, "distance") for value in values[1:]]
    settings = {
        "run_seed": seed,
        "limit": 96,
        "stores": STORES,
        "tokenizer": f"runs/toys/dualvitok/seed{seed}",
    }
    settings |= {"finished": True, "sampling": {"generate": {"guidance": 1.5}}} | more.pop("settings", {})
    sheet = {"version": 1, "part": "mllm", "step": 150, "settings": settings, "scores": scores, "samples": []}
    write_json(root / run / f"seed{seed}" / "scores" / "scores.json", sheet | more)
    return root / run / f"seed{seed}"


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Three seeds of one run, two of another that has no scores of pictures."""
    base = [evaluated(tmp_path, "runs/toys/base", seed, 0.7 + seed / 10, 0.25) for seed in (2, 0, 1)]
    return base + [
        evaluated(tmp_path, "runs/toys/discrete", seed, 0.5, settings={"limit": 32}) for seed in (0, 1)
    ]


def test_mean_and_deviation_of_each_group(runs: list[Path]) -> None:
    (comparison,) = compare(runs)
    assert [(group.name, list(group.scores)) for group in comparison.groups] == [
        ("base", [0, 1, 2]),
        ("discrete", [0, 1]),
    ]
    existence, distance = comparison.rows
    first, second = existence.cells
    assert first is not None and second is not None
    assert (first.mean, first.std) == pytest.approx((0.8, 0.1))
    assert second.values == (0.5, 0.5) and second.std == 0
    assert distance.cells[1] is None
    assert comparison.differences == {"limit": ("96", "32")}


def test_markdown_latex_and_csv_say_the_same(runs: list[Path]) -> None:
    comparisons = compare(runs)
    text = markdown(comparisons)
    assert "| task | score | base (n = 3) | discrete (n = 2) | the paper, on other data |" in text
    assert "| understanding | existence | 80.0 ± 10.0 % | 50.0 ± 0.0 % | 87.6 %" in text
    assert r"| generation | tower_distance | 0.2500 ± 0.0000 | – |" in text  # noqa: RUF001
    assert "- limit: 96 (base), 32 (discrete)" in text
    tex = latex(comparisons)
    assert r"understanding & existence & 80.0 $\pm$ 10.0~\% & 50.0 $\pm$ 0.0~\% \\" in tex
    assert r"generation & tower\_distance & 0.2500 $\pm$ 0.0000 & -- \\" in tex
    assert tex.replace("% mllm, mean ± standard", "").isascii()
    rows = list(csv.DictReader(io.StringIO(as_csv(comparisons))))
    assert [(row["group"], row["score"], row["n"]) for row in rows] == [
        ("base", "existence", "3"),
        ("discrete", "existence", "2"),
        ("base", "tower_distance", "3"),
    ]
    assert float(rows[0]["mean"]) == pytest.approx(0.8) and rows[0]["seeds"] == "0 1 2"
    assert [float(value) for value in rows[0]["values"].split()] == pytest.approx([0.7, 0.8, 0.9])


def test_the_papers_ablations_stand_beside_runs_of_their_setting(tmp_path: Path) -> None:
    names = ("zero_10_50", "random_10_10")
    runs = [evaluated(tmp_path, f"runs/ablations/table9/{name}", 0, 0.5, part="dualvitok") for name in names]
    for run in runs:
        sheet = json.loads((run / "scores/scores.json").read_text())
        sheet["scores"] = [score("imagenet", "psnr", 20.0, "dB")]
        write_json(run / "scores/scores.json", sheet)
    (comparison,) = compare(runs)
    (row,) = comparison.rows
    shown = [(number.printed, number.source) for number in row.paper]
    assert shown == [("22.53", "Table 4"), ("21.98", "Table 9"), ("21.97", "Table 9")]
    assert "21.97 dB (ablation, PSNR, zero, 10 % of samples, 50 % of their" in markdown([comparison]).replace(
        "\u00a0", " "
    )
    (other,) = compare([evaluated(tmp_path, "runs/toys/zero_10_50", 0, 0.5, part="dualvitok")])
    assert not any(row.paper for row in other.rows)


def test_one_seed_has_no_deviation(tmp_path: Path) -> None:
    text = markdown(compare([evaluated(tmp_path, "base", 0, 0.5)]))
    assert "| understanding | existence | 50.0 % |" in text and "base (n = 1)" in text


def test_scores_of_one_run_with_other_settings_are_told_apart_by_their_folder(tmp_path: Path) -> None:
    run = evaluated(tmp_path, "base", 0, 0.5)
    other = evaluated(tmp_path, "aside", 0, 0.4, settings={"sampling": {"generate": {"guidance": 1}}})
    (other / "scores").rename(run / "unguided")
    (comparison,) = compare([run / "scores", run / "unguided"])
    assert [group.name for group in comparison.groups] == ["base", "base/unguided"]
    assert comparison.differences == {"generate.guidance": ("1.5", "1")}


def test_schedules_stand_for_what_they_evaluate(tmp_path: Path) -> None:
    folders = []
    for seed in (0, 1):
        evaluated(tmp_path, "runs/toys/mllm", seed, 0.5 + seed / 5)
        evaluated(tmp_path, "runs/toys/tokenizer", seed, 0.9, part="dualvitok", settings={"tokenizer": ""})
        # One tokenizer for both seeds.
        steps = [
            {"name": part, "command": ["evaluate", run], "output": f"{run}/scores", "state": "finished"}
            for part, run in (
                ("tokenizer", "runs/toys/tokenizer/seed0"),
                ("mllm", f"runs/toys/mllm/seed{seed}"),
            )
        ]
        folders.append(tmp_path / f"runs/toys/schedule/seed{seed}")
        write_json(folders[-1] / "state.json", {"version": 1, "world": "toys", "seed": seed, "steps": steps})
    parts = {comparison.part: comparison for comparison in compare(folders)}
    assert list(parts) == ["dualvitok", "mllm"]
    cell = parts["mllm"].rows[0].cells[0]
    assert cell is not None and cell.values == (0.5, 0.7)
    (shared,) = parts["dualvitok"].groups
    assert list(shared.scores) == [0], "once, and with its own number of seeds"
    (tmp_path / "runs/toys/mllm/seed1/scores/scores.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"mllm/seed1/scores has no scores; run `illume evaluate runs/toys"
    ):
        compare(folders)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"settings": {"finished": False}},
            r"seed1.scores is of an unfinished training \(step 150\): finish it",
        ),
        ({"settings": {"limit": 32}}, "no two seeds of one run: limit is 96 and 32"),
        ({"step": 90}, "no two seeds of one run: step is 150 and 90"),
        ({"settings": {"run_seed": 0}}, r"seed0.scores and .*seed1.scores are both of seed 0: give one"),
        ({"settings": {"run_seed": None}}, "seed1.scores names no seed of its run; evaluate it again"),
        (
            {"settings": {"stores": {"understanding": {"path": "", "fingerprint": "bad"}}}},
            "different data for understanding: use one store",
        ),
    ],
)
def test_what_should_not_be_averaged_is_refused(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    runs = [evaluated(tmp_path, "base", 0, 0.5), evaluated(tmp_path, "base", 1, 0.6, **more)]
    with pytest.raises(ValueError, match=message):
        compare(runs)


def test_other_data_of_another_run_are_refused(tmp_path: Path) -> None:
    others = {"stores": {"understanding": {"path": "", "fingerprint": "bad"}}}
    runs = [evaluated(tmp_path, "base", 0, 0.5), evaluated(tmp_path, "more", 0, 0.6, settings=others)]
    with pytest.raises(ValueError, match="different data for understanding"):
        compare(runs)


def test_command(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["report", *map(str, runs), "--out", str(tmp_path / "out")])
    text, _ = capsys.readouterr()
    files = [tmp_path / f"out/seeds.{name}" for name in ("md", "tex", "csv")]
    assert text == files[0].read_text() + "".join(f"{path}\n" for path in files)
    assert sorted((tmp_path / "out").iterdir()) == sorted(files)
    cli.main(["report", str(runs[0])])
    assert capsys.readouterr()[0] == write_seeds(runs[:1])[0]
    (runs[0] / "scores/scores.json").write_text(json.dumps({"version": 9}))
    for folder in (runs[0], tmp_path):
        with pytest.raises(SystemExit):
            cli.main(["report", str(folder), str(runs[1])])
        assert re.fullmatch(r"illume report: error: .+\n", capsys.readouterr().err)


def test_no_folder_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", "--folders", "[]"])
    assert stop.value.code == 2
    expected = "no folder was given: name a schedule's, or those of evaluated runs"
    assert capsys.readouterr().err == f"illume report: error: {expected}\n"
    with pytest.raises(ValueError, match="there is nothing to compare"):
        compare([])
