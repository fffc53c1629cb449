"""What ``illume evaluate`` found: a run's ``scores/scores.json``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from illume_lightning.json_record import field, finite, objects, read_versioned, texts

VERSION = 1
SCORES = "scores.json"


@dataclass(frozen=True)
class Score:
    """One measured number; None stands for what was not measured or is not finite."""

    task: str
    name: str
    value: float | None
    low: float | None
    """Lower 95 % confidence limit."""

    high: float | None
    n: int | None
    unit: str
    baselines: dict[str, float | None]
    """In the same unit, such as chance."""


@dataclass(frozen=True)
class Sample:
    """One answer of the model; pictures are names of files relative to the scores' folder."""

    task: str
    prompt: str
    given: tuple[str, ...]
    made: tuple[str, ...]
    wanted: str | None
    answer: str | None
    expected: str | None
    right: bool | None


@dataclass(frozen=True)
class Scores:
    """All that was measured on one checkpoint."""

    folder: Path
    part: str
    """What the run trains: mllm, dualvitok or diffusion_decoder."""

    date: str
    step: int
    checkpoint_sha256: str
    seconds: float
    is_finished: bool
    """Whether training was, when it was evaluated."""

    settings: dict[str, Any]
    """All that decides the scores beside the checkpoint and the drawing: ``run_seed``, ``limit``, ``stores``, ..."""

    scores: tuple[Score, ...]
    samples: tuple[Sample, ...]

    def find(self, task: str, name: str) -> Score | None:
        """The score of a task (any whose name begins so) with this name."""
        found = (score for score in self.scores if score.task.startswith(task) and score.name == name)
        return next(found, None)


def read_scores(folder: Path, made_by: str) -> Scores:
    """Read ``scores.json``.

    Args:
        folder: with the scores.
        made_by: the command that writes them, for messages.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not readable, lacks something, or is of a newer version.
    """
    path = folder / SCORES
    record = read_versioned(path, VERSION, made_by)
    try:
        settings = field(record, "settings", dict, optional=True) or {}
        return Scores(
            folder=folder,
            part=field(record, "part", str, optional=True) or "",
            date=field(record, "date", str, optional=True) or "",
            step=field(record, "step", int),
            checkpoint_sha256=field(record, "checkpoint_sha256", str, optional=True) or "",
            seconds=finite(record, "seconds") or 0.0,
            is_finished=settings.get("finished", True) is not False,
            settings=settings,
            scores=tuple(_score(score) for score in objects(record, "scores")),
            samples=tuple(_sample(sample) for sample in objects(record, "samples")),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {made_by} writes it anew") from error


def _score(record: dict[str, Any]) -> Score:
    baselines = field(record, "baselines", dict, optional=True) or {}
    return Score(
        task=field(record, "task", str),
        name=field(record, "name", str),
        value=finite(record, "value"),
        low=finite(record, "low"),
        high=finite(record, "high"),
        n=field(record, "n", int, optional=True),
        unit=field(record, "unit", str),
        baselines={name: finite(baselines, name) for name in baselines},
    )


def _sample(record: dict[str, Any]) -> Sample:
    return Sample(
        task=field(record, "task", str),
        prompt=field(record, "prompt", str, optional=True) or "",
        given=texts(record, "given"),
        made=texts(record, "made"),
        wanted=field(record, "wanted", str, optional=True),
        answer=field(record, "answer", str, optional=True),
        expected=field(record, "expected", str, optional=True),
        right=field(record, "right", bool, optional=True),
    )
