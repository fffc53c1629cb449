"""Writing a schedule's report."""

import os
from pathlib import Path

import jinja2
from markupsafe import Markup

from illume_lightning.report.content import Content, read_content
from illume_lightning.report.markdown import markdown
from illume_lightning.report.schedule_state import read_state


def write_report(folder: str | Path, out: str | Path | None = None) -> list[Path]:
    """Write ``report.html``, which needs nothing beside it, and ``report.md``.

    Equal records give equal files on the same machine.

    Args:
        folder: of a schedule, ``runs/<world>/schedule/seed<N>``, with its ``state.json``.
        out: where to write; by default there.

    Returns:
        The files.

    Raises:
        FileNotFoundError: if the folder has no ``state.json``.
        ValueError: if that is not readable or of a newer version. What is wrong with a run is told in the report.
    """
    content = read_content(read_state(Path(folder)))
    target = Path(folder if out is None else out)
    target.mkdir(parents=True, exist_ok=True)
    texts = {"report.html": html(content), "report.md": markdown(content, target)}
    for name, text in texts.items():
        partial = target / f"{name}.partial"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, target / name)
    return [target / name for name in texts]


def html(content: Content) -> str:
    """The report as a page of HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("illume_lightning.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Curves are ours, and made of numbers; everything else is escaped.
    environment.filters["svg"] = Markup
    return environment.get_template("report.html").render(report=content)
