"""The file is checked before anything starts."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from toy_world import STEPS

from illume_lightning.schedule.steps import Step, read_schedule

ROOT = Path(__file__).parents[2]


def test_the_seed_and_the_flags_reach_every_fit(world: Path) -> None:
    schedule = read_schedule("schedule.yaml", 3, ["--trainer.devices", "2"])
    pictures, encoder, _, scores = schedule.steps
    assert pictures.command == ("prepare", "data/toy/train", "8")
    assert encoder.command == (
        *("fit", "-c", "encoder.yaml", "--trainer.devices", "2", "--seed_everything", "3"),
    )
    assert encoder.output == "runs/toy/encoder/seed3"
    assert encoder.configuration()["trainer"]["default_root_dir"] == "runs/toy/encoder/seed3"
    assert scores.command == ("evaluate", "runs/toy/tokenizer/seed3")
    assert (encoder.minutes, scores.minutes) == (6, None)
    assert str(schedule.folder) == "runs/toy/schedule/seed3"


def test_steps_build_on_the_paths_they_name(world: Path) -> None:
    steps = read_schedule("schedule.yaml").steps
    outputs = [step.output for step in steps]
    assert steps[1].mentioned(outputs[:1]) == ["data/toy/train"]
    assert steps[2].mentioned(outputs[:2]) == ["runs/toy/encoder/seed0"]
    assert steps[3].mentioned(outputs[:3]) == ["runs/toy/tokenizer/seed0"]
    step = Step("a", ("prepare", "./data/b-codes", "/x/data/c", "[{path: data/d/train}]"), "out")
    assert step.mentioned(["data/b", "data/b-codes", "data/c", "data/d"]) == ["data/b-codes", "data/d"]


def broken(number: int, **values: Any) -> list[dict[str, Any]]:
    return [{**step, **values} if place == number else step for place, step in enumerate(STEPS)]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"world": "toy", "steps": STEPS, "stps": 1}, "unknown key 'stps': a schedule has world and steps"),
        ({"world": "a/b", "steps": STEPS}, "world is 'a/b'"),
        ({"world": "toy", "steps": []}, "steps is \\[\\]"),
        ({"world": "toy", "steps": ["fit"]}, "step 1 is 'fit'"),
        ({"world": "toy", "steps": broken(1, minuts=3)}, "step 2: unknown key 'minuts': a step has name"),
        ({"world": "toy", "steps": broken(1, name="pictures")}, "two steps have the name 'pictures'"),
        ({"world": "toy", "steps": broken(0, output="./data/x/")}, None),
        (
            {"world": "toy", "steps": broken(3, output="data/toy/train/")},
            "two steps have the output 'data/toy/",
        ),
        ({"world": "toy", "steps": broken(0, name="../x")}, "name is '../x'"),
        ({"world": "toy", "steps": broken(0, run="rm -rf x")}, "must begin with one of prepare, fit"),
        ({"world": "toy", "steps": broken(0, run="prepare 'x")}, "no command line: No closing quotation"),
        ({"world": "toy", "steps": broken(0, run=None)}, "run is None"),
        ({"world": "toy", "steps": broken(0, output="")}, "output is ''"),
        ({"world": "toy", "steps": broken(0, minutes=-1)}, "minutes is -1"),
        (
            {"world": "toy", "steps": broken(1, run="fit -c gone.yaml")},
            "'encoder': there is no file gone.yaml",
        ),
        ({"world": "toy", "steps": broken(1, output="runs/other")}, "goes to 'runs/toy/encoder/seed0'"),
        ({"world": "toy", "steps": broken(0, output="data/${sed}")}, "can't be resolved.*sed"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(world: Path, content: object, expected: str | None) -> None:
    Path("schedule.yaml").write_text(yaml.safe_dump(content))
    if expected is None:
        assert read_schedule("schedule.yaml").steps[0].output == "data/x"
        return
    with pytest.raises((ValueError, FileNotFoundError), match=expected) as error:
        read_schedule("schedule.yaml")
    assert "\n" not in str(error.value)


def test_files_that_are_no_schedules(world: Path) -> None:
    Path("broken.yaml").write_text("world: [")
    with pytest.raises(ValueError, match="broken.yaml can't be read"):
        read_schedule("broken.yaml")
    Path("list.yaml").write_text("- a\n")
    with pytest.raises(ValueError, match="list.yaml holds a list"):
        read_schedule("list.yaml")
    with pytest.raises(FileNotFoundError, match="there is no file gone.yaml"):
        read_schedule("gone.yaml")
    with pytest.raises(ValueError, match="seed is -1"):
        read_schedule("schedule.yaml", -1)


def test_parts_are_named(world: Path) -> None:
    schedule = read_schedule("schedule.yaml")
    assert schedule.part(None, None) == range(4)
    assert schedule.part("encoder", "tokenizer") == range(1, 3)
    with pytest.raises(ValueError, match="no step 'mllm': the steps are pictures, encoder"):
        schedule.part("mllm", None)
    with pytest.raises(ValueError, match="'scores' comes after step 'encoder'"):
        schedule.part("scores", "encoder")


@pytest.mark.parametrize(
    "file",
    sorted((ROOT / "experiments").rglob("schedule*.yaml")),
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
def test_shipped_schedules(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step after the first fit builds on an earlier one, but fits of claims on the quick setting's tokenizer."""
    monkeypatch.chdir(ROOT)
    schedule = read_schedule(file, 5)
    assert schedule.world == file.parent.name + file.stem.removeprefix("schedule").replace("_", "-")
    begins = ("prepare", "report", *(["fit"] if schedule.world == "claims" else []))
    first = next(number for number, step in enumerate(schedule.steps) if step.is_fit)
    for number, step in enumerate(schedule.steps[first + 1 :], first + 1):
        if step.command[0] not in begins:
            assert step.mentioned([earlier.output for earlier in schedule.steps[:number]]), step.name


@pytest.mark.parametrize(
    "run",
    [
        *(
            "rm -rf /",
            "sh -c 'touch mark'",
            "/bin/sh",
            "../illume fit",
            "python -c 'import os'",
            "; touch mark",
            "$(touch mark)",
        ),
        *(
            "schedule other.yaml",
            "app runs/x --host 0.0.0.0",
            "doctor",
            "parity .",
            "consolidate a b",
            "FIT -c x",
            "-c fit",
        ),
        *(["sh", "-c", "touch mark"], [["fit"]], 7, "'fit", "\n", "\x00"),
    ],
)
def test_a_step_is_one_of_a_few_commands(world: Path, run: object) -> None:
    content = {"world": "toys", "steps": [{"name": "a", "run": run, "output": "data/a"}]}
    (world / "evil.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(
        ValueError, match=r"run is .* it must begin with one of prepare|no command line"
    ) as error:
        read_schedule(world / "evil.yaml")
    assert "\n" not in str(error.value)


def test_words_of_a_command_are_words(world: Path) -> None:
    run = "prepare shapes 'data/a; touch mark' $(touch mark) `touch mark` | tee > mark && touch mark"
    content = {"world": "toys", "steps": [{"name": "a", "run": run, "output": "data/a"}]}
    (world / "evil.yaml").write_text(yaml.safe_dump(content))
    (step,) = read_schedule(world / "evil.yaml").steps
    assert step.command[:5] == ("prepare", "shapes", "data/a; touch mark", "$(touch", "mark)")


def test_a_schedule_reads_nothing_of_the_environment(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    content = {
        "world": "toys",
        "steps": [{"name": "a", "run": "prepare x ${oc.env:SECRET_TOKEN}", "output": "a"}],
    }
    (world / "evil.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="environment variables would be saved") as error:
        read_schedule(world / "evil.yaml")
    assert "hunter2" not in str(error.value) and "\n" not in str(error.value)
    (world / "evil.yaml").write_text("world: !!python/object/apply:os.system ['touch mark']")
    with pytest.raises(ValueError, match="can't be read"):
        read_schedule(world / "evil.yaml")
    assert not (world / "mark").exists()
