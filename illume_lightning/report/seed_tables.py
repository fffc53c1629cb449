"""Means and standard deviations over seeds as Markdown, LaTeX and CSV."""

import csv
import io
import os
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from illume_lightning.escaping import one_line, plain, tex
from illume_lightning.report import words
from illume_lightning.report.markdown import table
from illume_lightning.report.seeds import Cell, Comparison, Row, compare


def write_seeds(folders: Sequence[str | Path], out: str | Path | None = None) -> tuple[str, list[Path]]:
    """Compare evaluated runs, seeds of the same run as one.

    Args:
        folders: see ``compare``.
        out: folder for ``seeds.md``, ``seeds.tex`` and ``seeds.csv``; by default nothing is written.

    Returns:
        The tables as Markdown, and the files.

    Raises:
        FileNotFoundError: see ``compare``.
        ValueError: see ``compare``.
    """
    comparisons = compare(folders)
    texts = {name: write(comparisons) for name, write in (("md", markdown), ("tex", latex), ("csv", as_csv))}
    paths = []
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            path = Path(out) / f"seeds.{name}"
            path.with_suffix(".partial").write_text(text, encoding="utf-8")
            os.replace(path.with_suffix(".partial"), path)
            paths.append(path)
    return texts["md"], paths


def markdown(comparisons: Sequence[Comparison]) -> str:
    """A table for each part of the model."""
    lines: list[str] = []
    for comparison in comparisons:
        has_paper = any(row.paper for row in comparison.rows)
        header = ["task", "score", *(f">{name}" for name in _headings(comparison))]
        header += ["the paper, on other data"] if has_paper else []
        rows = [
            (
                row.task,
                row.name,
                *_cells(row),
                *(["; ".join(number.cited for number in row.paper)] if has_paper else ()),
            )
            for row in comparison.rows
        ]
        lines += [f"{plain(_title(comparison))}:", "", *table(header, rows)]
        lines += [f"- {plain(text)}" for text in _differences(comparison)]
        lines += [""] if comparison.differences else []
    return "\n".join(lines).rstrip() + "\n"


def latex(comparisons: Sequence[Comparison]) -> str:
    """A `tabular` of the package booktabs for each part, a block for each task."""
    lines: list[str] = []
    for comparison in comparisons:
        headings = [tex(name) for name in _headings(comparison)]
        lines += [f"% {one_line(text)}" for text in (_title(comparison), *_differences(comparison))]
        lines += [rf"\begin{{tabular}}{{ll{'r' * len(headings)}}}", r"\toprule"]
        lines += [rf"Task & Score & {' & '.join(headings)} \\"]
        for task, rows in groupby(comparison.rows, key=lambda row: row.task):
            lines.append(r"\midrule")
            for number, row in enumerate(rows):
                cells = ["" if number else tex(task), tex(row.name)]
                cells += [tex(cell) for cell in _cells(row)]
                lines.append(rf"{' & '.join(cells)} \\")
        lines += [r"\bottomrule", r"\end{tabular}", ""]
    return "\n".join(lines)


def as_csv(comparisons: Sequence[Comparison]) -> str:
    """A line for each score of each group, shares between 0 and 1; the values of its seeds are in one field."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["part", "group", "task", "score", "unit", "mean", "std", "n", "seeds", "values"])
    for comparison in comparisons:
        for row in comparison.rows:
            for group, cell in zip(comparison.groups, row.cells, strict=True):
                if cell is not None:
                    place = (comparison.part, group.name, row.task, row.name, row.unit)
                    seeds, values = " ".join(map(str, group.scores)), " ".join(map(repr, cell.values))
                    writer.writerow([*place, cell.mean, cell.std, len(cell.values), seeds, values])
    return file.getvalue()


def _title(comparison: Comparison) -> str:
    return f"{comparison.part}, mean ± standard deviation over n seeds"


def _headings(comparison: Comparison) -> list[str]:
    return [f"{group.name} (n = {len(group.scores)})" for group in comparison.groups]


def _differences(comparison: Comparison) -> list[str]:
    names = [group.name for group in comparison.groups]
    texts = []
    for name, values in comparison.differences.items():
        pairs = zip(values, names, strict=True)
        texts.append(f"{name}: {', '.join(f'{value or words.NOTHING} ({group})' for value, group in pairs)}")
    return texts


def _cells(row: Row) -> list[str]:
    return [words.NOTHING if cell is None else _cell(cell, row.unit) for cell in row.cells]


def _cell(cell: Cell, unit: str) -> str:
    if cell.std is None:
        return words.number(cell.mean, unit)
    return f"{words.number(cell.mean, unit, with_unit=False)} ± {words.number(cell.std, unit)}"
