"""The paper's own numbers, to stand beside ours."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from illume_lightning.report.words import SPACE

PAPER_NUMBERS = Path(__file__).parents[2] / "docs" / "paper_numbers.yaml"
AREAS = ("tokenizer", "codebook", "understanding", "generation", "editing")
ABLATIONS = "ablations"


@dataclass(frozen=True)
class PaperNumber:
    """A number of the paper."""

    metric: str
    printed: str
    """The number as it stands there."""

    unit: str
    """share, percent, dB or points."""

    benchmark: str
    model: str
    source: str
    """Table."""

    section: str
    beside: str | None = None
    """Name of our score that asks the same kind of question, on other data."""

    run: str | None = None
    """Of an ablation, the folder of the run with its setting, such as ``ablations/table9/zero_10_50``."""

    @property
    def value(self) -> float:
        """The number."""
        return float(self.printed)

    @property
    def shown(self) -> str:
        """The number with its unit; shares in per cent, as ours."""
        if self.unit == "share":
            return f"{100 * self.value:.0f}{SPACE}%"
        return self.printed + {"percent": f"{SPACE}%", "dB": f"{SPACE}dB"}.get(self.unit, "")

    @property
    def measured(self) -> str:
        """What was measured, and on what."""
        return self.metric if self.benchmark in self.metric else f"{self.metric}, on {self.benchmark}"

    @property
    def cited(self) -> str:
        """The number, whose it is, what was measured, and where it stands."""
        return f"{self.shown} ({self.model}, {self.measured}, {self.source})"


def read_paper_numbers(path: Path = PAPER_NUMBERS) -> dict[str, list[PaperNumber]]:
    """The paper's numbers by area, and those of its ablations; empty where the repository's file is not at hand.

    Raises:
        ValueError: if an entry is not complete, or its value is no number.
    """
    if not path.is_file():
        return {}
    # As texts, so that 6.00 stays what the paper prints.
    record = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    numbers = {area: [_number(path, entry) for entry in record[area]] for area in AREAS}
    cells = [cell for row in record["ablations"] for cell in _cells(path, row, record["columns"])]
    return numbers | {ABLATIONS: [_number(path, cell) for cell in cells]}


def _cells(path: Path, row: dict[str, Any], columns: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """An entry for each value of a table's row."""
    try:
        given = {key: row[key] for key in ("source", "section", "run") if key in row} | {"model": "ablation"}
        for column, value in row["values"].items():
            yield {"metric": f"{column}, {row['row']}", "value": value, **columns[column], **given}
    except KeyError as error:
        raise ValueError(
            f"{path}: {row} lacks {error}, or has a value that `columns` doesn't name"
        ) from error


def _number(path: Path, entry: dict[str, Any]) -> PaperNumber:
    try:
        number = PaperNumber(printed=entry["value"], **{key: entry[key] for key in entry if key != "value"})
        float(number.printed)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {entry} is not a number with its source: {error}") from error
    return number
