"""Metrics of runs that were restarted, killed while writing, or went astray."""

from pathlib import Path

from illume_lightning.report.metrics import Phase, read_metrics


def write(run: Path, version: int, text: str) -> None:
    folder = run / "metrics" / f"version_{version}"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(text)


def test_restarts_are_joined_by_step_and_the_later_wins(tmp_path: Path) -> None:
    write(tmp_path, 0, "step,train/loss,val/x/psnr\n10,5,\n20,4,\n20,,31\n30,9,\n")
    write(tmp_path, 2, "step,train/loss,other\n30,3,1\n40,2,1\n")
    write(tmp_path, 10, "step,train/loss\n40,1\n")
    metrics = read_metrics(tmp_path)
    assert metrics.series["train/loss"] == [(10, 5.0), (20, 4.0), (30, 3.0), (40, 1.0)]
    assert metrics.validations() == {"x": {"psnr": 31.0}}
    assert (metrics.last_step, metrics.last("other"), metrics.last("nothing")) == (40, 1.0, None)
    assert metrics.notes == ()


def test_phases_begin_where_they_were_first_logged(tmp_path: Path) -> None:
    write(tmp_path, 0, "step,curriculum/phase,curriculum/side\n9,0.0,112.0\n19,0.0,112.0\n29,2.0,224.0\n")
    assert read_metrics(tmp_path).phases() == [Phase(0, 9, 112), Phase(2, 29, 224)]


def test_values_that_are_not_finite_are_left_out_and_told(tmp_path: Path) -> None:
    write(tmp_path, 0, "step,train/loss,train/other\n10,1,nan\n20,nan,nan\n30,inf,2\n40,2,2\n")
    metrics = read_metrics(tmp_path)
    assert metrics.series == {"train/loss": [(10, 1.0), (40, 2.0)], "train/other": [(30, 2.0), (40, 2.0)]}
    (note,) = metrics.notes
    assert note.startswith(
        "train/other is not a finite number 2 times, first at step 10; so are 1 other metrics"
    )


def test_a_torn_file_keeps_what_is_whole(tmp_path: Path) -> None:
    write(tmp_path, 0, "step,train/loss,train/b\n10,1,2\nnan,4,4\n20,0x1,5\n30,3")
    metrics = read_metrics(tmp_path)
    assert metrics.series == {"train/loss": [(10, 1.0), (30, 3.0)], "train/b": [(10, 2.0), (20, 5.0)]}
    assert "2 unreadable cells were left out" in metrics.notes[0]


def test_nothing_logged(tmp_path: Path) -> None:
    write(tmp_path, 0, "")
    metrics = read_metrics(tmp_path)
    assert (metrics.series, metrics.notes, metrics.last_step, metrics.phases()) == ({}, (), 0, [])
