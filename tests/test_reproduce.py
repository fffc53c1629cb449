"""`illume reproduce`: equal for an untouched run, and otherwise where it first differs."""

import csv
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_fit import STEPS, vision_encoder

import cli
from illume_lightning.reproduction.compare import Point, compare_digests, compare_series, compare_weights
from illume_lightning.reproduction.verdict import Verdict
from illume_lightning.run_json import read_run_json

METRICS = "metrics/version_0/metrics.csv"


@pytest.fixture(scope="module")
def run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a vision encoder; its stores are copies of its own."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(shapes, folder / "shapes")
    cli.main(vision_encoder(folder / "run", folder / "shapes"))
    return folder / "run"


@pytest.fixture
def again(run: Path) -> Path:
    """Where it is done again; what one test has trained the next ones compare."""
    return run.parent / "again"


@pytest.fixture
def record(run: Path, tmp_path: Path) -> Path:
    """The record alone, as it is handed on to others."""
    shutil.copy(run / "run.json", tmp_path)
    shutil.copy(run / METRICS, tmp_path)
    return tmp_path


def reproduce(run: Path, out: Path, *words: str) -> int:
    """Exit status."""
    try:
        cli.main(["reproduce", str(run), "--out", str(out), *words])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def change(file: Path, new: Callable[[int, str, float], float]) -> None:
    """Replace every logged value, by training step and name."""
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        for name in row.keys() - {"step", "epoch"}:
            if row[name]:
                row[name] = repr(new(int(row["step"]), name, float(row[name])))
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_first_steps_and_then_the_whole_run_come_out_equal(
    run: Path, again: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(run)
    assert reproduce(run, again, "--", "--trainer.max_steps", "2") == 0
    output = capsys.readouterr().out
    assert f"same     store {run.parent / 'shapes/train'}\n" in output
    assert f"equal: 14 values of 8 metrics of the first 2 training steps of {STEPS}; weights not" in output
    assert reproduce(run, again) == 0
    output = capsys.readouterr().out
    tensors = len(read_run_json(run)["weights"]["tensors"])
    assert (
        f"equal: 28 values of 8 metrics and {tensors} tensors after 4 training steps, bit for bit" in output
    )
    assert [start["from_step"] for start in read_run_json(again)["starts"]] == [0, 2], "it goes on"
    assert contents(run) == before
    assert read_run_json(again)["weights"]["digest"] == read_run_json(run)["weights"]["digest"]


def test_the_record_alone_is_enough(record: Path, again: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce(record, again) == 0
    output = capsys.readouterr().out
    assert "is there already" in output and "bit for bit" in output


def test_a_changed_series_differs_where_it_was_changed(
    record: Path, again: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(
        record / "metrics.csv",
        lambda step, name, value: value * 1.1 if (step, name) == (2, "train/loss") else value,
    )
    assert reproduce(record, again) == 1
    output = capsys.readouterr().out
    assert "differs  metrics.csv" in output and "it was changed" in output
    assert "first at training step 2 in train/loss: " in output and "1 of 28 values differ" in output


def test_nudged_numbers_are_equal_within_the_tolerance(
    record: Path, again: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(
        record / "metrics.csv", lambda step, name, value: value * (1 + 1e-7 * (1 + (name == "train/loss")))
    )
    assert reproduce(record, again) == 0
    output = capsys.readouterr().out
    assert "equal within 1e-05: " in output and "metrics: at most 2.0e-07 apart, train/loss" in output
    assert reproduce(record, again, "--tolerance", "1e-8") == 1


def test_another_store_is_refused(
    run: Path, record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    shutil.copytree(run.parent / "shapes/train", store)
    manifest = json.loads((store / "manifest.json").read_text())
    content = json.loads((record / "run.json").read_text())
    content["stores"][0]["path"] = str(store)
    (record / "run.json").write_text(json.dumps(content))
    manifest["packages"] = {}
    (store / "manifest.json").write_text(json.dumps(manifest))
    assert reproduce(record, tmp_path / "new", "--", "--trainer.max_steps=1") == 0
    assert "of the same records; it was prepared again" in capsys.readouterr().out
    manifest["chunks"][0]["sha256"] = "0" * 64
    (store / "manifest.json").write_text(json.dumps(manifest))
    assert reproduce(record, tmp_path / "out") == 2
    assert "is of other records" in capsys.readouterr().err
    shutil.rmtree(store)
    assert reproduce(record, tmp_path / "out") == 2
    assert "it is not here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists(), "nothing was trained"


def test_another_input_is_refused(record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = tmp_path / "encoder.bin"
    checkpoint.write_bytes(b"other weights")
    content = json.loads((record / "run.json").read_text())
    made_from = {"key": "trainer.WarmStart.checkpoint", "path": str(checkpoint), "sha256": "1" * 64}
    (record / "run.json").write_text(json.dumps(content | {"inputs": [made_from]}))
    assert reproduce(record, tmp_path / "out") == 2
    assert (
        f"trainer.WarmStart.checkpoint {checkpoint}: sha256 111111111111 recorded" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--", "--trainer.max_steps", "9"), "has 1 to 4 training steps"),
        (("--", "--trainer.max_steps"), "has 1 to 4 training steps"),
    ],
)
def test_wrong_words(
    run: Path, tmp_path: Path, words: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reproduce(run, tmp_path / "out", *words) == 2
    assert expected in capsys.readouterr().err


def test_folders_of_something_else_are_left_alone(
    run: Path, record: Path, again: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reproduce(run, run) == 2
    assert "the recorded run itself" in capsys.readouterr().err
    assert reproduce(run, run.parent) == 2
    assert "holds something else" in capsys.readouterr().err
    content: dict[str, Any] = json.loads((record / "run.json").read_text())
    content["config"]["resolved"]["seed_everything"] = 7
    (record / "run.json").write_text(json.dumps(content))
    assert reproduce(record, again) == 2
    assert "of another recorded run" in capsys.readouterr().err
    assert reproduce(tmp_path / "nowhere", tmp_path / "out") == 2
    assert "run.json is not there" in capsys.readouterr().err


def test_series_are_compared_by_step_and_name() -> None:
    recorded = {"loss": {1: 1.0, 2: math.nan, 3: 0.5}, "speed/images_per_s": {1: 5.0}, "old": {2: 1.0}}
    again = {"loss": {1: 1.0, 2: math.nan, 3: 0.4}, "speed/images_per_s": {1: 9.0}}
    points = compare_series(recorded, again)
    assert [(point.step, point.name, point.distance) for point in points] == [
        (1, "loss", 0.0),
        (2, "loss", 0.0),
        (2, "old", math.inf),
        (3, "loss", pytest.approx(0.2)),
    ]
    assert [point.step for point in compare_series(recorded, again, stop=3)] == [1, 2]
    assert Point(1, "loss", 1e-9, 2e-9).distance == pytest.approx(1e-3), "of nothing, everything is far"
    assert Point(1, "loss", math.nan, 1.0).distance == math.inf


def test_weights_are_compared_by_tensor_or_by_hash() -> None:
    one = {"a": torch.ones(3), "b": torch.tensor([1.0, 100.0]), "c": torch.ones(2)}
    other = {"a": torch.ones(3), "b": torch.tensor([1.5, 100.0]), "c": torch.ones(3)}
    assert [weight.distance for weight in compare_weights(one, other)] == [
        0.0,
        pytest.approx(0.005),
        math.inf,
    ]
    from illume_lightning.nn.digests import tensor_digests

    distances = [weight.distance for weight in compare_digests(tensor_digests(one), other)]
    assert distances[0] == 0.0 and math.isnan(distances[1]) and math.isnan(distances[2])


def test_weights_decide_where_metrics_do_not() -> None:
    points = [Point(1, "loss", 1.0, 1.0)]
    far = compare_weights({"a": torch.ones(1), "b": torch.ones(1)}, {"a": torch.ones(1), "b": torch.zeros(1)})
    verdict = Verdict(points, far, 1e-5, "all")
    assert not verdict.is_same
    assert "weights: first b (1.0e+00); 1 of 2 tensors differ" in verdict.text
    unknown = compare_digests({"b": "0"}, {"b": torch.ones(1)})
    verdict = Verdict(points, unknown, 1e-5, "all")
    assert verdict.is_same and "not the same bit for bit, first b" in verdict.text
