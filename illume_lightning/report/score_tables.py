"""The key numbers and the tables of scores."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from illume_lightning.report import words
from illume_lightning.report.paper import PaperNumber
from illume_lightning.report.runs import Gap, Run
from illume_lightning.report.scores import Score, Scores


@dataclass(frozen=True)
class KeyNumber:
    """One of the few numbers on top."""

    label: str
    about: str
    """What it says, in a few words."""

    value: str
    interval: str
    n: int | None
    baselines: str


@dataclass(frozen=True)
class Span:
    """Where a share, its interval and its baselines stand between 0 and 100 per cent."""

    value: float
    low: float
    high: float
    baselines: list[float]


@dataclass(frozen=True)
class ScoreRow:
    """A score, as it is written."""

    label: str
    value: str
    interval: str
    n: int | None
    baselines: str
    span: Span | None
    paper: list[PaperNumber]
    """The paper's answers to the same kind of question."""


@dataclass(frozen=True)
class ScoreTable:
    """The scores of one task."""

    title: str
    source: str
    """Run and step."""

    date: str
    """Of the evaluation, YYYY-MM-DD."""

    rows: list[ScoreRow]
    paper: list[PaperNumber]
    """All that the paper says about such a task."""

    has_baselines: bool


_KEY_NUMBERS = (
    # label, what it says, part, task, score
    ("Tokenizer", "PSNR of pictures through their codes", "dualvitok", "", "psnr"),
    ("Readable reconstructions", "scenes still right after the codes", "dualvitok", "", "scene"),
    ("Understanding", "questions answered right", "mllm", "understanding", "all"),
    ("Generation", "whole scenes as prompted", "mllm", "generation", "scene"),
    ("Generation, single object", "shape as prompted", "mllm", "generation", "single_object"),
    ("Editing", "pictures exactly as instructed", "mllm", "editing", "edit"),
)


def key_numbers(runs: Sequence[Run]) -> list[KeyNumber]:
    """The few numbers that say most; of an evaluated part, those it has."""
    found = []
    for label, about, part, task, name in _KEY_NUMBERS:
        run = last_scored(runs, part)
        if run is None or run.scores is None:
            found.append(KeyNumber(label, about, words.NOTHING, "", None, "not evaluated yet"))
            continue
        score = run.scores.find(task, name)
        if score is not None:
            if score.task != task:
                about += f", {words.label(score.task).lower()}"
            found.append(
                KeyNumber(
                    label,
                    about,
                    words.number(score.value, score.unit),
                    words.interval(score),
                    score.n,
                    words.baselines(score),
                )
            )
    return found


def last_scored(runs: Sequence[Run], part: str) -> Run | None:
    """The last run of a part that was evaluated."""
    return next((run for run in reversed(runs) if run.part.startswith(part) and run.scores), None)


def score_tables(runs: Sequence[Run], paper: dict[str, list[PaperNumber]]) -> list[ScoreTable]:
    """A table for each task of an MLLM, and one for each other evaluated run."""
    tables = []
    for run in runs:
        if run.scores is None:
            continue
        unfinished = "" if run.scores.is_finished else ", training unfinished"
        source = f"{run.step.output}, step {run.scores.step:,}{unfinished}"
        for title, scores, numbers in _grouped(run, run.scores, paper):
            rows: list[ScoreRow] = []
            for text, score in scores:
                # Of one score on several data, the first stands beside the paper's.
                is_first = all(score.name != other.name for _, other in scores[: len(rows)])
                rows.append(_row(text, score, numbers if is_first else ()))
            tables.append(
                ScoreTable(title, source, run.scores.date, rows, numbers, any(row.baselines for row in rows))
            )
    return tables


def _grouped(
    run: Run, scores: Scores, paper: dict[str, list[PaperNumber]]
) -> Iterator[tuple[str, list[tuple[str, Score]], list[PaperNumber]]]:
    """Titles, labelled scores and what the paper has of that kind; codebooks have a section of their own."""
    chosen = [score for score in scores.scores if not score.name.startswith(("semantic_", "pixel_"))]
    if run.is_mllm:
        for task in dict.fromkeys(score.task for score in chosen):
            labelled = [(words.label(score.name), score) for score in chosen if score.task == task]
            yield f"{run.title}: {words.label(task).lower()}", labelled, paper.get(task, [])
    elif chosen:
        names = list(dict.fromkeys(score.name for score in chosen))
        chosen.sort(key=lambda score: names.index(score.name))
        labelled = [
            (f"{words.label(score.name)}, {words.label(score.task).lower()}", score) for score in chosen
        ]
        yield run.title, labelled, paper.get("tokenizer", []) if run.part == "dualvitok" else []


def score_gaps(runs: Sequence[Run]) -> list[Gap]:
    """What was trained to be evaluated and has not been: DualViTok, the decoder and the MLLM's last stage."""
    stages = [run for run in runs if run.is_mllm]
    wanted = [run for run in runs if run.part in ("dualvitok", "diffusion_decoder") or run in stages[-1:]]
    return [run.gap or run.scores_gap for run in wanted if run.scores is None and run.scores_gap]


def _row(label: str, score: Score, numbers: Sequence[PaperNumber]) -> ScoreRow:
    return ScoreRow(
        label,
        words.number(score.value, score.unit),
        words.interval(score),
        score.n,
        words.baselines(score),
        _span(score),
        [number for number in numbers if number.beside == score.name],
    )


def _span(score: Score) -> Span | None:
    if score.unit != "share" or score.value is None:
        return None
    low = score.value if score.low is None else score.low
    high = score.value if score.high is None else score.high
    marks = [_percent(value) for value in score.baselines.values() if value is not None]
    return Span(_percent(score.value), _percent(low), _percent(high), marks)


def _percent(share: float) -> float:
    return round(100 * min(max(share, 0.0), 1.0), 2)
