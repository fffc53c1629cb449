"""What an evaluation finds, and its files: `scores.json`, tables, and pictures of samples."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from illume_lightning.data.part import write_text
from illume_lightning.evaluation.statistics import Estimate

VERSION = 1
SCORES = "scores.json"
PICTURES = "pictures"
SAMPLES_PER_TASK = 8

Part = Literal["mllm", "dualvitok", "diffusion_decoder"]
Unit = Literal["share", "dB", "ssim", "nats", "perplexity", "distance"]


@dataclass(frozen=True)
class Score:
    """One number.

    Args:
        task: name of the store, such as "understanding"; of pictures at several sizes with the size, "shapes-112".
        name: what is measured, such as "all", "count", "scene" or "psnr".
        value: of it.
        low: lower limit of the 95 % confidence interval; the value itself for what has none.
        high: upper limit.
        n: number of things measured.
        unit: of value, limits and baselines. A "distance" is 1 minus a cosine: 0 for equal pictures, at most 2.
        baselines: what less than the model reaches on the same data, by name.
    """

    task: str
    name: str
    value: float
    low: float
    high: float
    n: int
    unit: Unit
    baselines: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def of(
        task: str, name: str, estimate: Estimate, unit: Unit, baselines: dict[str, float] | None = None
    ) -> "Score":
        """An estimate under its name."""
        return Score(task, name, *estimate, unit, baselines or {})


@dataclass(frozen=True)
class Sample:
    """One of the things measured, to look at; pictures are files, relative to `scores.json`.

    Args:
        task: name of the store.
        prompt: what was asked.
        given: pictures that the model saw.
        made: pictures that it made.
        wanted: the right picture.
        answer: what it said.
        expected: what it should have said.
        right: whether it is right; none where nobody knows.
    """

    task: str
    prompt: str
    given: tuple[str, ...] = ()
    made: tuple[str, ...] = ()
    wanted: str | None = None
    answer: str | None = None
    expected: str | None = None
    right: bool | None = None


@dataclass(frozen=True)
class Shown:
    """A `Sample` whose pictures have no files yet; arguments as there."""

    task: str
    prompt: str
    given: tuple[Image.Image, ...] = ()
    made: tuple[Image.Image, ...] = ()
    wanted: Image.Image | None = None
    answer: str | None = None
    expected: str | None = None
    right: bool | None = None

    def save(self, folder: Path, number: int) -> Sample:
        """Write its pictures to `pictures` in a folder.

        Args:
            folder: of `scores.json`.
            number: of the sample within its task.
        """
        given = tuple(self._save(folder, f"{number}-given-{i}", image) for i, image in enumerate(self.given))
        made = tuple(self._save(folder, f"{number}-made-{i}", image) for i, image in enumerate(self.made))
        wanted = None if self.wanted is None else self._save(folder, f"{number}-wanted", self.wanted)
        return Sample(self.task, self.prompt, given, made, wanted, self.answer, self.expected, self.right)

    def _save(self, folder: Path, name: str, image: Image.Image) -> str:
        file = f"{PICTURES}/{self.task}-{name}.png"
        (folder / PICTURES).mkdir(parents=True, exist_ok=True)
        image.save(folder / file)
        return file


@dataclass
class Results:
    """Scores and samples as they come."""

    scores: list[Score] = field(default_factory=list)
    shown: list[Shown] = field(default_factory=list)

    def add(self, other: "Results") -> None:
        """Take another's over."""
        self.scores += other.scores
        self.shown += other.shown


@dataclass(frozen=True)
class ScoreSheet:
    """Everything about one evaluation of one run.

    Args:
        run: its folder.
        part: what it trains.
        step: training steps of the checkpoint.
        seed: of the evaluation's own drawing.
        checkpoint_sha256: of the checkpoint's file.
        date: YYYY-MM-DD.
        seconds: that the evaluation took.
        settings: all that decides the scores beside the checkpoint and the seed.
        scores: all numbers.
        samples: the first of every task.
        identity: of the run, as its record has it; none of runs without a record.
        commit: of the code that trained it, with ``-dirty`` behind it where the tree was not clean.
    """

    run: str
    part: Part
    step: int
    seed: int
    checkpoint_sha256: str
    date: str
    seconds: float
    settings: dict[str, Any]
    scores: tuple[Score, ...]
    samples: tuple[Sample, ...]
    identity: str | None = None
    commit: str | None = None

    def is_of(self, checkpoint_sha256: str, seed: int, settings: dict[str, Any]) -> bool:
        """Whether the same evaluation would be made again."""
        wanted = json.loads(json.dumps(settings))
        return (self.checkpoint_sha256, self.seed, self.settings) == (checkpoint_sha256, seed, wanted)

    def write(self, folder: Path) -> None:
        """Write `scores.json`, in full or not at all."""
        write_text(folder / SCORES, json.dumps({"version": VERSION, **asdict(self)}, indent=2) + "\n")


def read_scores(folder: str | Path) -> ScoreSheet | None:
    """What an evaluation wrote to a folder; none where there was none.

    Raises:
        ValueError: if the file is damaged or of another version.
    """
    file = Path(folder) / SCORES
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text())
        version = content.pop("version")
        if version == VERSION:
            content["scores"] = tuple(Score(**score) for score in content["scores"])
            content["samples"] = tuple(_sample(sample) for sample in content["samples"])
            return ScoreSheet(**content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged: evaluate the run again with `--again`") from error
    raise ValueError(
        f"{file} has version {version}, this code reads {VERSION}: evaluate the run again with `--again`"
    )


def save_samples(shown: Sequence[Shown], folder: Path) -> tuple[Sample, ...]:
    """Write the pictures of samples; each is numbered within its task."""
    counts: dict[str, int] = {}
    samples = []
    for sample in shown:
        number = counts[sample.task] = counts.get(sample.task, -1) + 1
        samples.append(sample.save(folder, number))
    return tuple(samples)


def _sample(content: dict[str, Any]) -> Sample:
    return Sample(**{**content, "given": tuple(content["given"]), "made": tuple(content["made"])})
