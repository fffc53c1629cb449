"""The same run with several seeds: mean and standard deviation of every score, beside those of other runs."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from illume_lightning.report.paper import ABLATIONS, PaperNumber, read_paper_numbers
from illume_lightning.report.schedule_state import read_state
from illume_lightning.report.scores import SCORES, Scores, read_scores

_SEED = re.compile(r"seed\d+")


@dataclass(frozen=True)
class Group:
    """One run with several seeds.

    Args:
        name: of its folder, without the seed's and without what the folders of all groups begin with.
        scores: of each seed, by seed.
    """

    name: str
    scores: dict[int, Scores]

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the scores beside the seed, by name, as text; it is the same of all seeds."""
        return _settings(next(iter(self.scores.values())))


@dataclass(frozen=True)
class Cell:
    """A score of a group.

    Args:
        values: of each seed, in the order of the group's.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Of the seeds."""
        return mean(self.values)

    @property
    def std(self) -> float | None:
        """Of a sample (n - 1); none of one seed."""
        return stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Row:
    """A score of all groups of a part.

    Args:
        task: as in `Score`.
        name: as in `Score`.
        unit: as in `Score`.
        cells: of each group; none where a seed lacks the score.
        paper: the paper's numbers for the same kind of question, on other data.
    """

    task: str
    name: str
    unit: str
    cells: tuple[Cell | None, ...]
    paper: tuple[PaperNumber, ...]


@dataclass(frozen=True)
class Comparison:
    """Runs of one part of the model.

    Args:
        part: mllm, dualvitok or diffusion_decoder.
        groups: the runs, as they were given.
        rows: all their scores.
        differences: what was not the same in their evaluations: name, and the value of each group.
    """

    part: str
    groups: tuple[Group, ...]
    rows: tuple[Row, ...]
    differences: dict[str, tuple[str, ...]]


def compare(folders: Sequence[str | Path]) -> list[Comparison]:
    """Read the scores of runs and group them by their folders' names but for the seed.

    Args:
        folders: of evaluated runs (``runs/shapes/mllm_stage3/seed0``), of scores, or of schedules, which stand for all
            runs that they evaluate; what several of them name counts once.

    Returns:
        One comparison for each part of the model.

    Raises:
        FileNotFoundError: if a folder has no scores.
        ValueError: if there is no folder, or scores can't be read or should not be averaged or compared: of an
            unfinished training, of other settings or of another number of steps than those of the other seeds, of
            other data than the other runs', or of the same seed twice.
    """
    if not folders:
        raise ValueError("there is nothing to compare: name folders of evaluated runs")
    named: dict[str, dict[str, dict[int, Scores]]] = {}
    for path in dict.fromkeys(path for folder in folders for path in _scored(Path(folder))):
        scores = read_scores(path, "`illume evaluate`")
        if not scores.is_finished:
            raise ValueError(
                f"{path} is of an unfinished training (step {scores.step:,}): finish it, or leave it out"
            )
        name, seed = _name(path), scores.settings.get("run_seed")
        if not isinstance(seed, int):
            raise ValueError(f"{path} names no seed of its run; evaluate it again")
        group = named.setdefault(scores.part, {}).setdefault(name, {})
        if seed in group:
            raise ValueError(f"{group[seed].folder} and {path} are both of seed {seed}: give one of them")
        for other in group.values():
            _check_same(other, scores)
        group[seed] = scores
    paper = read_paper_numbers()
    return [_comparison(part, groups, paper) for part, groups in named.items()]


def find_scores(folder: Path) -> Path | None:
    """The folder of an evaluation's scores, given itself or its run's; none where there are none."""
    return next((path for path in (folder, folder / "scores") if (path / SCORES).is_file()), None)


def _scored(folder: Path) -> list[Path]:
    """Folders of the scores that a folder stands for."""
    if (found := find_scores(folder)) is not None:
        return [found]
    if (folder / "state.json").is_file():
        state = read_state(folder)
        steps = [step for step in state.steps if step.command[:1] == ("evaluate",)]
        missing = [step for step in steps if not (state.path(step.output) / SCORES).is_file()]
        if missing:
            raise FileNotFoundError(f"{folder}: {missing[0].output} has no scores; run `{missing[0].shown}`")
        return [state.path(step.output) for step in steps]
    raise FileNotFoundError(f"{folder} has no scores; run `illume evaluate {folder}`")


def _name(folder: Path) -> str:
    """Its path without seed, and without `scores`."""
    parts = folder.parts[:-1] if folder.name == "scores" else folder.parts
    return "/".join(part for part in parts if not _SEED.fullmatch(part))


def _settings(scores: Scores) -> dict[str, Any]:
    settings = {name: value for name, value in scores.settings.items() if name not in ("run_seed", "stores")}
    sampling = settings.pop("sampling", None) or {}
    settings |= {
        f"{way}.{name}": value for way, options in sampling.items() for name, value in options.items()
    }
    # Another seed has another tokenizer, of the same name but for the seed.
    return {name: _SEED.sub("seed*", str(value)) for name, value in settings.items()} | {
        "step": str(scores.step)
    }


def _data(scores: Scores) -> dict[str, str]:
    return {task: str(store["fingerprint"]) for task, store in scores.settings.get("stores", {}).items()}


def _check_same(one: Scores, other: Scores) -> None:
    """Two seeds of one run."""
    for name, value in _settings(one).items():
        if (others := _settings(other).get(name)) != value:
            raise ValueError(
                f"{one.folder} and {other.folder} are no two seeds of one run: {name} is {value} and {others}"
            )
    _check_data(one, other)


def _check_data(one: Scores, other: Scores) -> None:
    found = _data(other)
    for task, fingerprint in _data(one).items():
        if found.get(task, fingerprint) != fingerprint:
            raise ValueError(
                f"{one.folder} and {other.folder} were evaluated on different data for {task}: use one store"
            )


def _comparison(
    part: str, named: dict[str, dict[int, Scores]], paper: dict[str, list[PaperNumber]]
) -> Comparison:
    common = _common([name.split("/") for name in named])
    groups = tuple(
        Group("/".join(name.split("/")[common:]), dict(sorted(scores.items())))
        for name, scores in named.items()
    )
    every = [scores for group in groups for scores in group.scores.values()]
    for scores in every[1:]:
        _check_data(every[0], scores)
    keys = dict.fromkeys((score.task, score.name, score.unit) for scores in every for score in scores.scores)
    ablations = [number for number in paper.get(ABLATIONS, []) if _is_of(number, named)]
    rows = []
    for task, name, unit in keys:
        numbers = paper.get(task if part == "mllm" else "tokenizer" if part == "dualvitok" else "", [])
        beside = tuple(number for number in (*numbers, *ablations) if number.beside == name)
        rows.append(Row(task, name, unit, tuple(_cell(group, task, name) for group in groups), beside))
    settings = [group.settings for group in groups]
    names = dict.fromkeys(name for values in settings for name in values)
    found = {name: tuple(values.get(name, "") for values in settings) for name in names}
    differences = {name: values for name, values in found.items() if len(set(values)) > 1}
    return Comparison(part, groups, tuple(rows), differences)


def _is_of(number: PaperNumber, names: Iterable[str]) -> bool:
    """Whether one of the groups has the setting of an ablation's number."""
    return number.run is not None and any(f"/{name}".endswith(f"/{number.run}") for name in names)


def _common(names: list[list[str]]) -> int:
    """How many first parts all have; the last of each stays."""
    shortest = min(len(name) for name in names)
    return next(
        (number for number in range(shortest - 1) if len({name[number] for name in names}) > 1), shortest - 1
    )


def _cell(group: Group, task: str, name: str) -> Cell | None:
    values = []
    for scores in group.scores.values():
        found = (score.value for score in scores.scores if (score.task, score.name) == (task, name))
        value = next(found, None)
        if value is None:
            return None
        values.append(value)
    return Cell(tuple(values))
