"""Scores as tables: Markdown to read, LaTeX to print."""

from dataclasses import dataclass
from itertools import groupby

from illume_lightning.escaping import one_line, plain, tex
from illume_lightning.evaluation.scores import Score, ScoreSheet, Unit

_DIGITS: dict[Unit, int] = {"dB": 2, "ssim": 4, "nats": 4, "perplexity": 3, "distance": 4}


@dataclass(frozen=True)
class _Row:
    """One score as words."""

    task: str
    name: str
    value: str
    interval: str
    n: str
    baselines: str


def markdown(sheet: ScoreSheet) -> str:
    """A heading and one table with a row for each score."""
    lines = [f"{plain(_title(sheet))}\n", "| task | score | value | 95 % limits | n | baselines |"]
    lines.append("|---|---|---:|---:|---:|---|")
    for row in map(_row, sheet.scores):
        cells = (row.task, row.name, row.value, row.interval, row.n, row.baselines)
        lines.append(f"| {' | '.join(map(plain, cells))} |")
    return "\n".join(lines) + "\n"


def latex(sheet: ScoreSheet) -> str:
    """A `tabular` for the package booktabs, a block for each task."""
    lines = [f"% {one_line(_title(sheet))}", r"\begin{tabular}{llrrrl}", r"\toprule"]
    lines.append(r"Task & Score & Value & 95\,\% limits & $n$ & Baselines \\")
    for task, rows in groupby(map(_row, sheet.scores), key=lambda row: row.task):
        lines.append(r"\midrule")
        for number, row in enumerate(rows):
            cells = ("" if number else task, row.name, row.value, row.interval, row.n, row.baselines)
            lines.append(f"{' & '.join(map(tex, cells))} \\\\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _title(sheet: ScoreSheet) -> str:
    unfinished = "" if sheet.settings.get("finished", True) else ", unfinished"
    return f"{sheet.run} ({sheet.part}), step {sheet.step:,}{unfinished}"


def _row(score: Score) -> _Row:
    has_limits = score.low < score.high
    interval = f"{_number(score.low, score.unit)} to {_number(score.high, score.unit)}" if has_limits else ""
    baselines = ", ".join(
        f"{name.replace('_', ' ')} {_number(value, score.unit)}" for name, value in score.baselines.items()
    )
    value = _number(score.value, score.unit) + {"share": " %", "dB": " dB"}.get(score.unit, "")
    return _Row(score.task, score.name, value, interval, str(score.n), baselines)


def _number(value: float, unit: Unit) -> str:
    return f"{100 * value:.1f}" if unit == "share" else f"{value:.{_DIGITS[unit]}f}"
