"""The report's tables as Markdown, with links to the pictures where they lie."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from illume_lightning.escaping import plain
from illume_lightning.report.content import Content, SampleGroup, SampleView
from illume_lightning.report.pictures import Picture
from illume_lightning.report.runs import Gap
from illume_lightning.report.score_tables import ScoreTable


def markdown(content: Content, folder: Path) -> str:
    """The whole report.

    Args:
        content: what to say.
        folder: that the text will lie in; links are relative to it.
    """
    lines = [f"# ILLUME+ on {plain(content.world)}, seed {content.seed}", ""]
    facts = (content.date, content.progress, f"{content.total} in all", f"written on {content.hardware}")
    lines += [plain(" · ".join(fact for fact in facts if fact)), ""]
    rows = [
        (number.label, number.about, number.value, number.interval, number.n, number.baselines)
        for number in content.key_numbers
    ]
    lines += table(("key number", "what it says", ">value", ">95 % interval", ">n", "baselines"), rows)
    lines += ["## Scores", ""]
    for scores in content.score_tables:
        lines += _scores(scores)
    lines += _gaps(content.score_gaps)
    lines += ["## Samples", ""]
    for group in content.sample_groups:
        lines += _samples(group, folder)
    for grid in content.grids:
        lines += [f"{plain(grid.title)}:", "", _image(grid.picture, folder), ""]
    lines += ["## Curves", "", "Drawn in `report.html`; the last held-out metrics of each run:", ""]
    for curves in content.curve_groups:
        for held_out in curves.held_out:
            lines += [f"{plain(held_out.title)}, step {held_out.step:,}", ""]
            header = ("data", *(f">{column}" for column in held_out.columns))
            lines += table(header, [(data, *cells) for data, cells in held_out.rows])
        lines += [f"- {plain(note)}" for note in curves.notes] + ([""] if curves.notes else [])
        lines += _gaps(curves.gaps)
    lines += _codebook(content)
    lines += ["## Steps", ""]
    header = ("step", "state", "started", ">time", ">restarts", "fingerprint", "command")
    steps = [
        (row.name, row.state, row.started, row.duration, row.restarts, row.fingerprint, " ".join(row.words))
        for row in content.steps
    ]
    lines += [*table(header, steps), *_records(content)]
    return "\n".join(lines).rstrip() + "\n"


def _records(content: Content) -> Iterator[str]:
    yield from ("## Runs", "")
    header = (
        *("run", "status", "commit", "identity", ">seed", ">steps", ">samples", ">time", ">restarts"),
        *(">most memory", "hardware", "versions"),
    )
    rows = [
        (
            *(run.title, row.status, row.commit, row.identity, row.seed, row.steps, row.samples),
            *(row.duration, row.restarts, row.memory, row.hardware, row.versions),
        )
        for run in content.runs
        if (row := run.record)
    ]
    if rows:
        yield from table(header, rows)
    yield from _gaps(content.record_gaps)


def _scores(scores: ScoreTable) -> Iterator[str]:
    yield from (
        f"### {plain(scores.title)}",
        "",
        plain(", ".join(filter(None, (scores.source, scores.date)))),
        "",
    )
    header = ("score", ">value", ">95 % interval", ">n", "baselines", "the paper, on other data")
    rows = [
        (
            row.label,
            row.value,
            row.interval,
            row.n,
            row.baselines,
            "; ".join(number.cited for number in row.paper),
        )
        for row in scores.rows
    ]
    yield from table(header, rows)
    others = [number for number in scores.paper if number.beside is None]
    if others:
        yield f"Also in the paper, not on the same data: {plain('; '.join(number.cited for number in others))}."
        yield ""


def _samples(group: SampleGroup, folder: Path) -> Iterator[str]:
    yield from (f"### {plain(group.title)}", "")
    if group.count:
        yield from (f"{group.count[:1].upper()}{group.count[1:]}.", "")
    columns = list(dict.fromkeys(role for sample in group.samples for role, _ in sample.pictures))
    has_answers = any(sample.answer is not None or sample.expected is not None for sample in group.samples)
    header = ("prompt", *columns, *(("answer", "expected") if has_answers else ()), "right")
    rows = []
    for sample in group.samples:
        answers = (sample.answer, sample.expected) if has_answers else ()
        rows.append((sample.prompt, *_roles(sample, columns, folder), *answers, _mark(sample.right)))
    yield from table(header, rows)


def _roles(sample: SampleView, columns: Sequence[str], folder: Path) -> list["Ready"]:
    return [
        Ready(" ".join(_image(picture, folder) for role, picture in sample.pictures if role == column))
        for column in columns
    ]


def _mark(right: bool | None) -> str:
    return "" if right is None else "yes" if right else "no"


def _codebook(content: Content) -> Iterator[str]:
    yield from ("## Codebooks", "")
    header = ["pictures"]
    for book in ("semantic", "pixel"):
        header += [f">{book} codes in use", ">perplexity", ">dead codes"]
    if content.codebook:
        yield from table(header, [(row.data, *row.semantic, *row.pixel) for row in content.codebook])
    if content.codebook_paper:
        yield f"In the paper: {plain('; '.join(number.cited for number in content.codebook_paper))}."
        yield ""
    if content.codebook_gap:
        yield from _gaps([content.codebook_gap])


class Ready(str):
    """A cell that is Markdown already."""


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    """A table and an empty line; columns whose header begins with > are flush right."""
    yield "| " + " | ".join(plain(name.removeprefix(">")) for name in header) + " |"
    yield "|" + "|".join("---:" if name.startswith(">") else "---" for name in header) + "|"
    for row in rows:
        cells = (
            "" if cell is None else cell if isinstance(cell, Ready) else plain(str(cell)) for cell in row
        )
        yield "| " + " | ".join(cells) + " |"
    yield ""


def _gaps(gaps: Sequence[Gap]) -> Iterator[str]:
    for gap in gaps:
        command = gap.command.replace("`", "'")
        yield f"- Missing: {plain(gap.text)}" + (f" Run `{command}`." if command else "")
    if gaps:
        yield ""


def _image(picture: Picture, folder: Path) -> str:
    if picture.problem:
        return plain(picture.problem)
    path = os.path.relpath(picture.path.resolve(), folder.resolve())
    return f"![{plain(picture.path.stem)}]({quote(Path(path).as_posix())})"
