"""All answers of a folder on one page that needs nothing beside it."""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from illume_lightning.lit.job_lines import words

THUMBNAIL_SIDE = 192
MAX_CELLS = 2000
"""Answers on the page, so that a browser can show it."""

_PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 2em }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax({side}px, 1fr)); gap: 1.5em }}
figure {{ margin: 0; overflow-wrap: anywhere }}
figcaption p {{ margin: .3em 0; white-space: pre-wrap; max-height: 12em; overflow: auto }}
small {{ opacity: .6 }}
.error {{ color: #c33 }}
</style>
<h1>{title}</h1>
<p>{summary}</p>
<main>
{cells}
</main>
</html>
"""


def contact_sheet(records: Sequence[dict[str, Any]], folder: Path) -> str:
    """A page of HTML with small copies of the pictures, what was asked for and what was said.

    Args:
        records: of the answers; the first ``MAX_CELLS`` are shown.
        folder: that the names of their pictures are relative to.
    """
    num_pictures = sum(len(record.get("pictures", ())) for record in records)
    num_errors = sum("error" in record for record in records)
    summary = f"{len(records):,} answers, {num_pictures:,} pictures, {num_errors:,} errors"
    if len(records) > MAX_CELLS:
        summary += f"; the first {MAX_CELLS:,} are shown"
    cells = "\n".join(_cell(record, folder) for record in records[:MAX_CELLS])
    return _PAGE.format(
        title=escape(folder.resolve().name), side=THUMBNAIL_SIDE, summary=summary, cells=cells
    )


def _cell(record: dict[str, Any], folder: Path) -> str:
    pictures = "".join(_thumbnail(folder, name) for name in record.get("pictures", ()))
    said = record.get("text") and f"<p><b>{escape(record['text'])}</b></p>"
    error = "error" in record and f'<p class="error">{escape(record["error"])}</p>'
    seed = f" · seed {record['settings']['seed']}" if "settings" in record else ""
    caption = f"<p>{escape(words(record['task']))}</p>{said or ''}{error or ''}"
    small = f"<small>{escape(record['id'])}{seed}</small>"
    return f"<figure>{pictures}<figcaption>{caption}{small}</figcaption></figure>"


def _thumbnail(folder: Path, name: str) -> str:
    buffer = io.BytesIO()
    with Image.open(folder / name) as image:
        small = image.convert("RGB")
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    small.save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    size = f'width="{small.width}" height="{small.height}"'
    return f'<a href="{escape(quote(name))}"><img {size} alt="" src="data:image/jpeg;base64,{data}"></a>'
