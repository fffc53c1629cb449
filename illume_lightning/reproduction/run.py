"""Doing a recorded run again in another folder, and comparing the two."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from illume_lightning.data.part import write_text
from illume_lightning.lit.run_file import last_weights
from illume_lightning.lit.saved_run import LAST
from illume_lightning.metric_values import read_values
from illume_lightning.reproduction.checks import check, check_series
from illume_lightning.reproduction.compare import (
    Weight,
    compare_digests,
    compare_series,
    compare_weights,
)
from illume_lightning.reproduction.verdict import Verdict
from illume_lightning.run_json import FINISHED, RUN_JSON, moved, read_run_json, root_of

CONFIG = "reproduce.yaml"
"""The recorded configuration with the new folder, in that folder."""

_MAX_STEPS = "--trainer.max_steps"


def reproduce(
    run: str | Path,
    fit: Callable[[list[str]], object],
    say: Callable[[str], object],
    out: str | Path | None = None,
    tolerance: float = 1e-5,
    flags: Sequence[str] = (),
) -> Verdict:
    """Do a run again and compare it with its record. A run that was killed on the way goes on.

    Args:
        run: its folder, or one with its `run.json` and `metrics.csv`; nothing is written there.
        fit: trains, given the words after `illume`.
        say: is told each line of what was found before training.
        out: folder of the new run; by default the recorded one with ``-reproduced`` behind it.
        tolerance: largest relative difference of runs that are called equal.
        flags: of `illume fit`, behind the recorded configuration. `--trainer.max_steps N` ends the phases too; then the
            first N training steps are compared.

    Raises:
        FileNotFoundError: if there is no record.
        ValueError: if the record can't be read, or a store or an input is not the recorded one, or the folder is
            another run's; names the way out.
    """
    run = Path(run)
    record = read_run_json(run)
    recorded, _ = read_values(run)
    if not recorded:
        raise ValueError(
            f"{run} has no metrics.csv to compare with: give a run of `illume fit` with a CSV logger"
        )
    found = [*check(record), check_series(record, recorded)]
    for one in found:
        say(one.line)
    wrong = [one for one in found if one.difference and one.is_needed]
    if wrong:
        raise ValueError(
            f"{run} can't be done again: {'; '.join(f'{o.what}: {o.difference}' for o in wrong)}"
        )
    steps, flags = _steps(record, flags)
    config, target = _config(record, run, out, steps)
    _train(config, target, flags, fit, say)
    return _compare(run, target, record, steps, tolerance)


def _steps(record: dict[str, Any], flags: Sequence[str]) -> tuple[int, list[str]]:
    """Training steps to do, and the flags without their number."""
    words, steps = list(flags), int(record["steps"])
    for number, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == _MAX_STEPS:
            value = value if equals else "".join(words[number + 1 : number + 2])
            if not value.isdigit() or not 1 <= int(value) <= steps:
                raise ValueError(
                    f"{_MAX_STEPS} is {value!r}: the recorded run has 1 to {steps} training steps"
                )
            return int(value), words[:number] + words[number + (1 if equals else 2) :]
    if not steps:
        raise ValueError("the recorded run has no finished training step; there is nothing to compare")
    return steps, words


def _config(
    record: dict[str, Any], run: Path, out: str | Path | None, steps: int
) -> tuple[dict[str, Any], Path]:
    """The recorded configuration in another folder and with this many training steps."""
    config = record["config"]["resolved"]
    root = root_of(config)
    target = Path(out) if out is not None else Path(root + "-reproduced")
    if target.resolve() in (run.resolve(), Path(root).resolve()):
        raise ValueError(
            f"{target} is the recorded run itself, which stays as it is: give another folder with --out"
        )
    config = config | {"trainer": moved(config["trainer"], root, str(target)) | {"max_steps": steps}}
    phases = config["curriculum"]["phases"]
    first = next((n for n, phase in enumerate(phases) if phase["until_step"] >= steps), len(phases) - 1)
    cut = [*phases[:first], phases[first] | {"until_step": steps}]
    return config | {"curriculum": config["curriculum"] | {"phases": cut}}, target


def _train(
    config: dict[str, Any],
    target: Path,
    flags: list[str],
    fit: Callable[[list[str]], object],
    say: Callable[[str], object],
) -> None:
    file = target / CONFIG
    if file.is_file():
        if _lasting(yaml.safe_load(file.read_text())) != _lasting(config):
            raise ValueError(
                f"{target} is of another recorded run: remove it, or give another folder with --out"
            )
    elif target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} holds something else: give another folder with --out")
    if (target / RUN_JSON).is_file():
        again = read_run_json(target)
        if again["status"] == FINISHED and again["steps"] == config["trainer"]["max_steps"]:
            say(f"done     {target} is there already; remove it to train anew")
            return
    if (target / LAST).exists():  # the new run's own, before the one that the recorded run started from
        config = config | {"ckpt_path": None}
    target.mkdir(parents=True, exist_ok=True)
    write_text(file, yaml.safe_dump(config, sort_keys=False))
    say(f"training {config['trainer']['max_steps']} steps in {target}")
    fit(["fit", "-c", str(file), *flags])


def _lasting(config: dict[str, Any]) -> dict[str, Any]:
    """What stays the same if a reproduction is given more training steps, or goes on."""
    kept = {key: value for key, value in config.items() if key not in ("curriculum", "ckpt_path")}
    return kept | {"trainer": config["trainer"] | {"max_steps": None}}


def _compare(run: Path, target: Path, record: dict[str, Any], steps: int, tolerance: float) -> Verdict:
    recorded, again = read_values(run)[0], read_values(target)[0]
    is_whole = record["status"] == FINISHED and steps == record["steps"]
    points = compare_series(recorded, again, None if is_whole else steps)
    weights = _weights(run, target, record) if is_whole else []
    if not points:
        raise ValueError(
            f"no metric was logged by both runs in the first {steps} training steps: give --trainer.max_steps of at "
            "least trainer.log_every_n_steps"
        )
    scope = f"{len(points)} values of {len({point.name for point in points})} metrics"
    if is_whole:
        scope += f" and {len(weights)} tensors" if weights else "; there are no weights to compare"
        scope += f" after {steps} training steps"
    else:
        scope += f" of the first {steps} training steps of {record['max_steps']}; weights not compared"
    return Verdict(points, weights, tolerance, scope)


def _weights(run: Path, target: Path, record: dict[str, Any]) -> list[Weight]:
    recorded, again = last_weights(run), last_weights(target)
    if recorded is not None and again is not None:
        return compare_weights(recorded, again)
    digests = (record["weights"] or {}).get("tensors")
    return compare_digests(digests, again) if digests and again is not None else []
