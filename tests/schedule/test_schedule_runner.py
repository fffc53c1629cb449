"""A schedule that is killed, stopped, edited and started twice ends as one that is left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from toy_world import PROGRAM, STEPS, edit, journal, outputs, state, write_world

from illume_lightning.schedule.command import main
from illume_lightning.schedule.outputs import ingredients, move_aside
from illume_lightning.schedule.steps import Step

NUM_KILLS = 8
DRIVER = f"import sys\nfrom illume_lightning.schedule.command import main\nsys.exit(main(sys.argv[1:], {PROGRAM!r}))"

linux = pytest.mark.skipif(
    sys.platform != "linux", reason="reads /proc, and children end with their parent on Linux"
)


def start(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    """The schedule as a process of its own."""
    command = [sys.executable, "-c", DRIVER, "schedule.yaml", *words]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def at_work(folder: Path) -> list[str]:
    """Commands of steps that are alive in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_text().split("\0")
            if PROGRAM[1] in words and Path(os.readlink(process / "cwd")) == folder:
                found.append(" ".join(words))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an uninterrupted schedule makes."""
    folder = write_world(tmp_path_factory.mktemp("straight"))
    process = start(folder)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0, printed.decode()
    assert len(journal(folder)) == 8
    return outputs(folder)


@linux
def test_kills_at_random_instants_change_nothing(straight: dict[str, bytes], tmp_path: Path) -> None:
    folder, moments = write_world(tmp_path / "world"), random.Random(0)
    file = folder / "runs/toy/schedule/seed0/state.json"
    finished: dict[str, int] = {}
    killed = 0
    while killed < NUM_KILLS:
        process = start(folder)
        # Often while a step is at work, now and then while the schedule starts or checks.
        if moments.random() < 0.8:
            wait_until(lambda started=process: at_work(folder) or started.poll() is not None)
        time.sleep(moments.uniform(0.0, 0.25))
        process.kill()
        _, status = process.communicate(), process.returncode
        wait_until(lambda: not at_work(folder))
        if status == 0:
            break
        killed += 1
        lines = journal(folder)
        for name, entry in (state(folder) if file.is_file() else {}).items():
            if entry["state"] == "finished":
                again = [
                    line
                    for line in lines[finished.setdefault(name, len(lines)) :]
                    if line.startswith("begin")
                ]
                assert " ".join(["begin", *entry["command"]]) not in again, "it was finished"
    process = start(folder)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0, printed.decode()
    assert outputs(folder) == straight
    entries = state(folder)
    assert {entry["state"] for entry in entries.values()} == {"finished"}
    begun = [line for line in journal(folder) if line.startswith("begin")]
    assert killed > 3
    assert len(begun) >= 4
    assert sum(entry["restarts"] for entry in entries.values()) >= len(begun) - 4
    before = len(journal(folder))
    assert start(folder).wait(60) == 0
    assert len(journal(folder)) == before, "everything was finished"


@linux
def test_two_at_once_are_refused(world: Path) -> None:
    first = start(world)
    wait_until(lambda: at_work(world))
    second = start(world)
    printed, _ = second.communicate(timeout=60)
    assert second.returncode != 0
    assert f"is being worked on by process {first.pid}" in printed.decode()
    assert first.wait(60) == 0


@linux
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_is_passed_on(straight: dict[str, bytes], world: Path, number: int, status: int) -> None:
    process = start(world)
    wait_until(lambda: "begin fit -c encoder.yaml --seed_everything 0" in journal(world))
    wait_until(lambda: "phase 1/1" in process_log(world))
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == status
    assert "the same command continues" in printed.decode()
    assert not at_work(world)
    if number == signal.SIGTERM:
        assert journal(world)[-1].startswith("stopped fit -c encoder.yaml"), "it could save, and ended with 0"
    assert state(world)["encoder"]["state"] == "running"
    assert start(world).wait(60) == 0
    assert state(world)["encoder"]["restarts"] == 1
    assert outputs(world) == straight


def process_log(world: Path) -> str:
    file = world / "runs/toy/schedule/seed0/encoder.log"
    return file.read_text() if file.is_file() else ""


def test_what_was_done_is_kept(
    do: Callable[..., int], world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert do("--until", "encoder") == 0
    assert [line.split()[0] for line in journal(world)] == ["begin", "end"] * 2
    assert do("--from", "tokenizer") == 0
    entries = state(world)
    assert list(entries) == ["pictures", "encoder", "tokenizer", "scores"]
    for name, entry in entries.items():
        assert (entry["state"], entry["restarts"]) == ("finished", 0)
        assert len(entry["fingerprint"]) == len(entry["output_sha256"]) == 64
        assert 0 < entry["seconds"] < 30
        assert (world / f"runs/toy/schedule/seed0/{name}.log").is_file()
    assert len({entry["fingerprint"] for entry in entries.values()}) == 4
    printed = capsys.readouterr().out
    assert "total" in printed and "data/toy/train" in printed
    (world / "encoder.yaml").write_text("# said otherwise\n" + (world / "encoder.yaml").read_text())
    assert do("--", "--trainer.devices", "2") == 0
    assert len(journal(world)) == 8, "comments and hardware don't count"


def test_from_needs_what_comes_before(do: Callable[..., int], world: Path) -> None:
    with pytest.raises(ValueError, match="'pictures' comes before --from and is not finished"):
        do("--from", "encoder")
    assert journal(world) == []


def test_a_changed_yaml_is_refused_and_redone(do: Callable[..., int], world: Path) -> None:
    assert do() == 0
    before = outputs(world)
    edit(world / "tokenizer.yaml", rate=2)
    with pytest.raises(
        ValueError, match="'tokenizer': tokenizer.yaml has changed since it was finished; --redo"
    ):
        do()
    assert outputs(world) == before
    assert do("--redo") == 0
    after = outputs(world)
    run = "runs/toy/tokenizer/seed0"
    assert after[f"{run}.old-1/checkpoints/last.ckpt"] == before[f"{run}/checkpoints/last.ckpt"]
    assert after[f"{run}/checkpoints/last.ckpt"] != before[f"{run}/checkpoints/last.ckpt"]
    assert after[f"{run}/scores/scores.json"] != before[f"{run}/scores/scores.json"]
    begun = [line.split()[1:4] for line in journal(world) if line.startswith("begin")][4:]
    assert begun == [["fit", "-c", "tokenizer.yaml"], ["evaluate", run]], "the encoder stayed"
    assert do() == 0


def test_what_builds_on_something_changed_is_redone(do: Callable[..., int], world: Path) -> None:
    assert do() == 0
    edit(world / "encoder.yaml", steps=20)
    assert do("--redo", "--until", "encoder") == 0
    with pytest.raises(
        ValueError, match="'tokenizer': what step 'encoder' made has changed since it was finished"
    ):
        do()
    assert do("--redo") == 0
    assert Path("runs/toy/tokenizer/seed0.old-1").is_dir()
    assert not Path("data/toy/train.old-1").exists()


def test_a_report_is_made_anew_of_what_there_is(do: Callable[..., int], world: Path) -> None:
    step = Step("report", ("report", "x"), "x")
    earlier = [(Step("a", ("prepare", "a"), "a"), "1"), (Step("b", ("prepare", "b"), "b"), "2")]
    assert {"what step 'a' made": "1", "what step 'b' made": "2"}.items() <= ingredients(
        step, earlier
    ).items()
    write_world(world, [*STEPS, {"name": "report", "run": "report report.html", "output": "report.html"}])
    assert do() == 0
    edit(world / "tokenizer.yaml", rate=2)
    assert do("--redo") == 0
    assert [line.split()[1] for line in journal(world) if line.startswith("begin")].count("report") == 2
    assert not Path("report.html.old-1").exists()
    assert do() == 0
    assert [line.split()[1] for line in journal(world) if line.startswith("begin")].count("report") == 2


def test_keep_goes_on_in_what_is_there(do: Callable[..., int], world: Path) -> None:
    assert do("--until", "encoder") == 0
    edit(world / "encoder.yaml", steps=30)
    assert do("--keep", "--until", "encoder") == 0
    step, _ = json.loads(Path("runs/toy/encoder/seed0/checkpoints/last.ckpt").read_text())
    assert step == 30
    assert not Path("runs/toy/encoder/seed0.old-1").exists()
    assert state(world)["encoder"]["restarts"] == 1
    assert do("--until", "encoder") == 0


def test_outputs_that_were_touched_or_are_not_ours_are_refused(do: Callable[..., int], world: Path) -> None:
    last = world / "runs/toy/encoder/seed0/checkpoints/last.ckpt"
    last.parent.mkdir(parents=True)
    last.write_text('[25, "of another run"]')
    with pytest.raises(ValueError, match="'encoder': .*is there already, and not from this schedule"):
        do()
    assert do("--redo") == 0
    last.write_text('[25, "touched"]')
    with pytest.raises(ValueError, match="runs/toy/encoder/seed0 is no longer as it left it"):
        do()
    good = outputs(world)
    for path in (last.parent.parent, world / "data"):
        path.rename(path.with_name(path.name + "-elsewhere"))
    assert do() == 0, "what is gone is made again, and what is made of the same stays"
    assert {name: good[name] for name in good if "tokenizer" in name}.items() <= outputs(world).items()
    begun = [line.split()[1:4] for line in journal(world) if line.startswith("begin")][4:]
    assert begun == [["prepare", "data/toy/train", "8"], ["fit", "-c", "encoder.yaml"]]


def test_a_folder_in_the_place_of_a_checkpoint_names_the_way_out(do: Callable[..., int], world: Path) -> None:
    assert do("--until", "encoder") == 0
    last = Path("runs/toy/encoder/seed0/checkpoints/last.ckpt")
    last.unlink()
    last.mkdir()
    with pytest.raises(ValueError, match=f"`illume consolidate {last} {last}`, or train with strategy fsdp2"):
        do()


def test_a_failure_shows_the_end_of_the_log(
    do: Callable[..., int], world: Path, capsys: pytest.CaptureFixture
) -> None:
    assert do("--", "--fails_at", "12") == 1
    error = capsys.readouterr().err
    assert "line 11\n" in error and "line 10\n" not in error, "20 lines"
    assert "no memory\n" in error
    assert "step 'encoder' failed with exit status 1" in error
    assert "runs/toy/schedule/seed0/encoder.log. The same command continues." in error
    assert state(world)["encoder"]["state"] == "running"
    with pytest.raises(ValueError, match="'encoder': its command has changed since it was begun"):
        do()
    assert do("--keep") == 0
    assert state(world)["encoder"]["restarts"] == 1


def test_a_step_that_leaves_nothing_is_not_finished(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule.yaml"], (sys.executable, "-c", "pass")) == 1
    assert "'pictures' ended well, but there is no data/toy/train" in capsys.readouterr().err


def test_a_damaged_state_is_told(do: Callable[..., int], world: Path) -> None:
    file = world / "runs/toy/schedule/seed0/state.json"
    file.parent.mkdir(parents=True)
    file.write_text("{")
    with pytest.raises(ValueError, match="state.json can't be read .*: move it away"):
        do()
    file.write_text('{"version": 2, "steps": []}')
    with pytest.raises(ValueError, match="has version 2, this code reads 1"):
        do()


@linux
def test_a_command_that_outlives_its_schedule_is_waited_for(
    world: Path, monkeypatch: pytest.MonkeyPatch, do: Callable[..., int]
) -> None:
    monkeypatch.setattr("illume_lightning.schedule.runner._WAIT_SECONDS", 0.3)
    assert do("--until", "pictures") == 0
    file = world / "runs/toy/schedule/seed0/state.json"
    left = subprocess.Popen(["sleep", "60"], process_group=0)
    values = Path(f"/proc/{left.pid}/stat").read_text().rpartition(")")[2].split()
    content = json.loads(file.read_text())
    try:
        file.write_text(json.dumps({**content, "child": {"pid": left.pid, "start": values[19]}}))
        with pytest.raises(
            BlockingIOError, match=f"process {left.pid} of this schedule's last start is still"
        ):
            do()
        file.write_text(json.dumps({**content, "child": {"pid": left.pid, "start": "1"}}))
        assert do("--until", "pictures") == 0, "another process has the id by now"
        file.write_text(json.dumps({**content, "child": {"pid": left.pid, "start": values[19]}}))
        left.kill()
        assert do() == 0, "a dead process that nobody has asked after yet is no hindrance"
    finally:
        left.kill()
        left.wait()


def test_nothing_is_moved_onto_something(tmp_path: Path) -> None:
    step = Step("a", ("prepare", "x"), str(tmp_path / "x"))
    assert move_aside(step) is None
    for number in (1, 2):
        (tmp_path / "x").mkdir()
        (tmp_path / "x.partial").mkdir()
        assert move_aside(step) == f"{tmp_path / 'x'}.old-{number}"
    assert len(list(tmp_path.iterdir())) == 4
