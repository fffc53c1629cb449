"""All that a report says, before it becomes HTML or Markdown."""

import importlib.metadata
import os
import platform
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from illume_lightning.report import words
from illume_lightning.report.curve_groups import CurveGroup, curve_groups
from illume_lightning.report.paper import PaperNumber, read_paper_numbers
from illume_lightning.report.pictures import Picture, read_picture
from illume_lightning.report.runs import Gap, Run, read_runs
from illume_lightning.report.schedule_state import ScheduleState, Step
from illume_lightning.report.score_tables import (
    KeyNumber,
    ScoreTable,
    key_numbers,
    score_gaps,
    score_tables,
)
from illume_lightning.report.scores import Sample

MAX_SAMPLES = 12
"""Of a task; the first ones, not the best."""

CODEBOOKS = ("semantic", "pixel")


@dataclass(frozen=True)
class SampleView:
    """One answer with its pictures."""

    prompt: str
    pictures: list[tuple[str, Picture]]
    """Each under what it is: given, made or wanted."""

    answer: str | None
    expected: str | None
    right: bool | None


@dataclass(frozen=True)
class SampleGroup:
    """Answers of one task."""

    title: str
    count: str
    samples: list[SampleView]
    is_narrow: bool
    """Whether no answer has more than one picture."""


@dataclass(frozen=True)
class Grid:
    """A picture that a fit wrote of its held-out data."""

    title: str
    picture: Picture


@dataclass(frozen=True)
class CodebookRow:
    """Use of both codebooks on some pictures; each a list of usage, perplexity and dead codes."""

    data: str
    semantic: list[str]
    pixel: list[str]


@dataclass(frozen=True)
class StepRow:
    """A step of the schedule, as it is written."""

    name: str
    state: str
    started: str
    duration: str
    restarts: int
    fingerprint: str
    words: list[str]
    """Of the command, as a shell wants them."""


@dataclass(frozen=True)
class Content:
    """The report."""

    world: str
    seed: int
    date: str
    total: str
    hardware: str
    progress: str
    key_numbers: list[KeyNumber]
    score_tables: list[ScoreTable]
    score_gaps: list[Gap]
    sample_groups: list[SampleGroup]
    grids: list[Grid]
    curve_groups: list[CurveGroup]
    codebook: list[CodebookRow]
    codebook_gap: Gap | None
    codebook_paper: list[PaperNumber]
    steps: list[StepRow]
    runs: list[Run]
    record_gaps: list[Gap]


def read_content(state: ScheduleState) -> Content:
    """Collect everything from the records of a schedule."""
    runs = read_runs(state)
    paper = read_paper_numbers()
    dates = [words.day(step.started) for step in state.steps]
    dates += [words.day(run.scores.date) for run in runs if run.scores]
    tokenizers = [run for run in runs if run.part == "dualvitok"]
    codebook = [row for run in tokenizers for row in _codebook(run)]
    return Content(
        world=state.world,
        seed=state.seed,
        date=max(dates, default=""),
        total=words.duration(sum(step.seconds for step in state.steps)),
        hardware=_hardware(),
        progress=_progress(state.steps),
        key_numbers=key_numbers(runs),
        score_tables=score_tables(runs, paper),
        score_gaps=score_gaps(runs),
        sample_groups=[group for run in runs for group in _sample_groups(run)],
        grids=[grid for run in runs for grid in _grids(run)],
        curve_groups=curve_groups(runs),
        codebook=codebook,
        codebook_gap=None if codebook else _codebook_gap(tokenizers),
        codebook_paper=paper.get("codebook", []),
        steps=[_step_row(step) for step in state.steps],
        runs=runs,
        record_gaps=[run.record_gap for run in runs if run.record_gap],
    )


def _hardware() -> str:
    """The machine that writes the report, which the records do not name otherwise."""
    parts = [platform.processor() or platform.machine(), f"{os.cpu_count()} processors"]
    try:
        parts.append(f"torch {importlib.metadata.version('torch')}")
    except importlib.metadata.PackageNotFoundError:
        parts.append("torch not installed")
    return ", ".join(parts)


def _progress(steps: Sequence[Step]) -> str:
    """Empty when everything is finished."""
    finished = sum(step.state == "finished" for step in steps)
    return "" if finished == len(steps) else f"{finished} of {len(steps)} steps finished"


def _sample_groups(run: Run) -> list[SampleGroup]:
    if run.scores is None:
        return []
    groups = []
    for task in dict.fromkeys(sample.task for sample in run.scores.samples):
        samples = [sample for sample in run.scores.samples if sample.task == task]
        shown = [_sample_view(run.scores.folder, sample) for sample in samples[:MAX_SAMPLES]]
        count = f"the first {len(shown)} of {len(samples)}" if len(shown) < len(samples) else ""
        is_narrow = all(len(view.pictures) <= 1 for view in shown)
        groups.append(SampleGroup(f"{run.title}: {words.label(task).lower()}", count, shown, is_narrow))
    return groups


def _sample_view(folder: Path, sample: Sample) -> SampleView:
    names = [("given", name) for name in sample.given] + [("made", name) for name in sample.made]
    pictures = [(role, read_picture(folder, name)) for role, name in names]
    if sample.wanted is not None:
        wanted = read_picture(folder, sample.wanted)
        # Of a reconstruction, what is wanted is what was given.
        if not any(picture.uri == wanted.uri != "" for _, picture in pictures):
            pictures.append(("wanted", wanted))
    return SampleView(sample.prompt, pictures, sample.answer, sample.expected, sample.right)


def _grids(run: Run) -> list[Grid]:
    """The pictures of the last validation while training."""
    folders = sorted((run.folder / "pictures").glob("step=*"), key=lambda path: (len(path.name), path.name))
    if not folders:
        return []
    step = folders[-1].name.removeprefix("step=").lstrip("0") or "0"
    return [
        Grid(f"{run.title}, step {step}: {path.stem}", read_picture(folders[-1], path.name))
        for path in sorted(folders[-1].glob("*.png"))
    ]


def _codebook(run: Run) -> list[CodebookRow]:
    """From its scores, its last validation, and its training."""
    rows: dict[str, dict[str, float | None]] = {}
    for score in run.scores.scores if run.scores else ():
        rows.setdefault(f"{words.label(score.task)}, evaluated", {})[score.name] = score.value
    for data, metrics in run.metrics.validations().items():
        rows[f"{words.label(data)}, last validation"] = dict(metrics)
    rows["Training, the last steps"] = {
        name.removeprefix("train/"): run.metrics.last(name)
        for name in run.metrics.series
        if name.startswith("train/")
    }
    return [
        CodebookRow(data, *(_book(values, book) for book in CODEBOOKS))
        for data, values in rows.items()
        if any(f"{book}_usage" in values for book in CODEBOOKS)
    ]


def _book(values: dict[str, float | None], book: str) -> list[str]:
    usage, perplexity, dead = (values.get(f"{book}_{name}") for name in ("usage", "perplexity", "dead"))
    return [
        words.number(usage, "share"),
        words.number(perplexity, "perplexity"),
        words.NOTHING if dead is None else f"{dead:,.0f}",
    ]


def _codebook_gap(tokenizers: Sequence[Run]) -> Gap:
    for run in tokenizers:
        gap = run.gap or run.scores_gap
        if gap:
            return gap
    return Gap("No run of this schedule says how its codebooks are used.")


def _step_row(step: Step) -> StepRow:
    return StepRow(
        step.name,
        step.state,
        words.minute(step.started),
        words.duration(step.seconds) if step.seconds else "",
        step.restarts,
        step.fingerprint[:8],
        [shlex.quote(word) for word in ("illume", *step.command)],
    )
