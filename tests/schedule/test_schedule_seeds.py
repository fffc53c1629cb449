"""A schedule with several seeds: what they share is done once, and a table of their scores ends it."""

import csv
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import pytest
import yaml
from toy_world import PROGRAM, SHARED, STEPS, edit, journal, outputs, state, write_shared_world, write_world

import cli
from illume_lightning.schedule.command import main

ENCODER = "fit -c encoder.yaml --seed_everything 0"


def tokenizer(seed: int) -> str:
    return f"fit -c tokenizer.yaml --seed_everything {seed}"


def begun(folder: Path) -> list[str]:
    return [line.removeprefix("begin ") for line in journal(folder) if line.startswith("begin")]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder; pictures and encoder name no seed."""
    monkeypatch.chdir(write_shared_world(tmp_path / "world"))
    return tmp_path / "world"


def test_what_seeds_share_is_done_once(
    do: Callable[..., int], world: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert do("--seeds", "0", "2", "1") == 0
    folders = [f"runs/toy/tokenizer/seed{seed}" for seed in (0, 2, 1)]
    report = (
        f"report {' '.join(f'{folder}/scores' for folder in folders)} --out runs/toy/schedule/table-0-1-2"
    )
    own = [
        words for seed in (0, 2, 1) for words in (tokenizer(seed), f"evaluate runs/toy/tokenizer/seed{seed}")
    ]
    assert begun(world) == ["prepare data/toy/train 8", ENCODER, *own, report]
    assert "seed 2 (2/3) [3/4] tokenizer: starts" in caplog.messages
    values = [json.loads(Path(f, "scores/scores.json").read_text())["scores"][0]["value"] for f in folders]
    with Path("runs/toy/schedule/table-0-1-2/seeds.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["seeds"], row["n"], float(row["mean"])) == ("0 1 2", "3", pytest.approx(mean(values)))
    assert float(row["std"]) == pytest.approx(stdev(values)) and stdev(values) > 0
    printed = capfd.readouterr().out
    assert "(n = 3) |" in printed and Path("runs/toy/schedule/table-0-1-2/seeds.md").read_text() in printed
    rows = [line.split()[:4] for line in printed.splitlines()[:4]]
    assert rows == [["seed", "steps", "took", "restarts"], *([s, d, "of", d] for s, d in ("04", "22", "12"))]
    for seed in (0, 1, 2):
        entries = state(world, seed)
        assert {entry["state"] for entry in entries.values()} == {"finished"}
        assert entries["encoder"] == state(world)["encoder"]
    assert do("--seeds", "0", "1", "2") == 0
    assert begun(world)[len(own) + 3 :] == [
        report.replace(
            " ".join(f"{f}/scores" for f in folders),
            " ".join(f"runs/toy/tokenizer/seed{seed}/scores" for seed in (0, 1, 2)),
        )
    ], "only the table is made anew"


def test_a_later_seed_takes_what_an_earlier_one_has_made(do: Callable[..., int], world: Path) -> None:
    assert do("--seed", "3") == 0
    # A record that is damaged, and one of other outputs, which were made anew since.
    content = json.loads(Path("runs/toy/schedule/seed3/state.json").read_text())
    for entry in content["steps"]:
        entry["output_sha256"] = "0" * 64
    for seed, text in ((8, "{"), (9, json.dumps(content))):
        Path(f"runs/toy/schedule/seed{seed}").mkdir()
        Path(f"runs/toy/schedule/seed{seed}/state.json").write_text(text)
    (world / "schedule.yaml").write_text(yaml.safe_dump({"world": "other", "steps": SHARED}))
    assert do("--seed", "4", "--until", "encoder") == 0
    assert do("--seed", "4") == 0
    assert begun(world)[4:] == [tokenizer(4), "evaluate runs/toy/tokenizer/seed4"], "of another world too"


def test_a_shared_output_that_was_touched_is_not_taken(do: Callable[..., int], world: Path) -> None:
    assert do("--seed", "0", "--until", "encoder") == 0
    Path("runs/toy/encoder/seed0/checkpoints/last.ckpt").write_text('[12, "touched"]')
    with pytest.raises(ValueError, match="'encoder': runs/toy/encoder/seed0 is there already, and not from"):
        do("--seed", "1")


def test_a_changed_step_that_all_share_is_redone_once(do: Callable[..., int], world: Path) -> None:
    assert do("--seeds", "0", "1") == 0
    edit(world / "encoder.yaml", rate=2)
    before = outputs(world)
    with pytest.raises(ValueError, match=r"^seed 0: step 'encoder': encoder.yaml has changed since it was"):
        do("--seeds", "0", "1")
    assert outputs(world) == before
    number = len(begun(world))
    assert do("--seeds", "0", "1", "--redo") == 0
    again = [words for words in begun(world)[number:] if words.startswith("fit")]
    assert again == [ENCODER, tokenizer(0), tokenizer(1)]
    assert Path("runs/toy/encoder/seed0.old-1").is_dir() and not Path("runs/toy/encoder/seed0.old-2").exists()
    edit(world / "encoder.yaml", steps=15)
    assert do("--seeds", "0", "1", "--keep", "--until", "encoder") == 0
    assert begun(world)[-1] == ENCODER, "once"
    assert json.loads(Path("runs/toy/encoder/seed0/checkpoints/last.ckpt").read_text())[0] == 15


def test_a_later_seed_is_refused_before_the_first_begins(do: Callable[..., int], world: Path) -> None:
    stranger = Path("runs/toy/tokenizer/seed1/checkpoints/last.ckpt")
    stranger.parent.mkdir(parents=True)
    stranger.write_text("[12, 0]")
    with pytest.raises(
        ValueError, match="seed 1: step 'tokenizer': runs/toy/tokenizer/seed1 is there already"
    ):
        do("--seeds", "0", "1")
    assert journal(world) == []
    with pytest.raises(ValueError, match="seed 0: step 'pictures' comes before --from and is not finished"):
        do("--seeds", "0", "2", "--from", "encoder")


@pytest.mark.skipif(sys.platform != "linux", reason="children end with their parent on Linux")
def test_killed_it_goes_on_to_the_same(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"import sys\nfrom illume_lightning.schedule.command import main\nsys.exit(main(sys.argv[1:], {PROGRAM!r}))"
    command = [sys.executable, "-c", code, "schedule.yaml", "--seeds", "0", "1"]
    moments = (ENCODER, tokenizer(1))
    for moment in moments:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while moment not in begun(world):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        time.sleep(0.1)
        process.kill()
        process.wait()
    assert main(["schedule.yaml", "--seeds", "0", "1"], PROGRAM) == 0
    again = begun(world)
    assert all(again.count(words) == (2 if words in moments else 1) for words in again)
    killed = outputs(world)
    monkeypatch.chdir(write_shared_world(tmp_path / "straight"))
    assert main(["schedule.yaml", "--seeds", "0", "1"], PROGRAM) == 0
    assert outputs(tmp_path / "straight") == killed


def test_the_outlook_sums_all_seeds(
    do: Callable[..., int], world: Path, capsys: pytest.CaptureFixture
) -> None:
    assert do("--dry-run", "--seeds", "0", "1", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("seed")] == ["seed 0", "seed 1", "seed 2"]
    states = [line.split()[2] for line in lines if line[:1].isdigit()]
    assert states == ["waiting"] * 4 + ["shared", "shared", "waiting", "waiting"] * 2
    assert lines[-1] == "left: 6 min 12 s, and 6 steps of unknown length"
    assert not Path("runs").exists()
    write_world(world, STEPS)
    assert do("--dry-run", "--seeds", "0", "1", "2") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "left: 18 min 12 s, and 6 steps of unknown length"


def test_without_evaluations_there_is_no_table(do: Callable[..., int], world: Path) -> None:
    assert do("--seeds", "0", "1", "--until", "tokenizer") == 0
    assert begun(world)[-1] == tokenizer(1)
    assert not list(Path("runs/toy/schedule").glob("table*"))


@pytest.mark.parametrize("kind", ["plain", "torchrun", "slurm"])
def test_printed_scripts_do_all_seeds(
    kind: str, world: Path, do: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    """With stand-ins that write down what they are given; a job's id is the number of its call."""
    assert do("--seeds", "0", "1", "--print", kind) == 0
    script = capsys.readouterr().out
    assert script.splitlines()[1] == f"# illume schedule schedule.yaml --seeds 0 1 --print {kind}"
    (world / "tools").mkdir()
    for name in ("illume", "torchrun"):
        text = f'#!/bin/bash\n[ {name} = illume ] || while [ "$1" != cli ]; do shift; done\n'
        (world / "tools" / name).write_text(text + f'[ {name} = illume ] || shift\necho "$@" >>calls\n')
    (world / "tools/srun").write_text('#!/bin/bash\n"$@"\n')
    submit = 'echo "$@" >>jobs; bash -c "${@: -1}" >&2; wc -l <jobs\n'
    (world / "tools/sbatch").write_text("#!/bin/bash\n" + submit)
    for tool in (world / "tools").iterdir():
        tool.chmod(0o755)
    environment = os.environ | {"PATH": f"{world / 'tools'}:{os.environ['PATH']}", "GPUS": "2"}
    subprocess.run(["bash"], input=script, text=True, check=True, env=environment, capture_output=True)
    calls = Path("calls").read_text().splitlines()
    devices = "" if kind == "plain" else " --trainer.devices 2 --trainer.num_nodes 1"
    expected = ["prepare data/toy/train 8", ENCODER + devices]
    for seed in (0, 1):
        expected += [tokenizer(seed) + devices, f"evaluate runs/toy/tokenizer/seed{seed}"]
    scores = " ".join(f"runs/toy/tokenizer/seed{seed}/scores" for seed in (0, 1))
    assert calls == [*expected, f"report {scores} --out runs/toy/schedule/table-0-1"]
    if kind == "slurm":
        jobs = Path("jobs").read_text().splitlines()
        waits = [[word for word in job.split() if word.startswith("--dependency")] for job in jobs]
        after = [[], ["1"], ["2"], ["3"], ["2"], ["5"], ["4:6"]]
        assert waits == [[f"--dependency=afterok:{ids}" for ids in each] for each in after]


def test_seeds_that_would_overwrite_one_another_are_refused(world: Path) -> None:
    steps = [*STEPS[:2], {**STEPS[2], "output": "runs/toy/tokenizer"}]
    edit(world / "tokenizer.yaml", trainer={"default_root_dir": "runs/toy/tokenizer"})
    write = {"world": "toy", "steps": steps}
    (world / "schedule.yaml").write_text(yaml.safe_dump(write))
    with pytest.raises(
        ValueError, match=r"'tokenizer' leaves runs/toy/tokenizer with every seed: put \$\{seed\}"
    ):
        main(["schedule.yaml", "--seeds", "0", "1"], PROGRAM)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--seeds", "0", "1", "0"], "--seeds names 0 twice: give each seed once"),
        (["--seeds", "0", "-1"], "argument --seeds: '-1' is no seed: give a whole number of at least 0"),
        (["--seeds", "0", "one"], "argument --seeds: 'one' is no seed"),
        (["--seed", "1.5"], "argument --seed: '1.5' is no seed"),
        (["--seeds"], "argument --seeds: expected at least one argument"),
        (["--seed", "1", "--seeds", "0", "1"], "argument --seeds: not allowed with argument --seed"),
    ],
)
def test_wrong_seeds(
    words: list[str], expected: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["schedule", "schedule.yaml", *words])
    assert stop.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("illume schedule: error: ") and expected in last
