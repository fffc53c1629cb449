"""Texts of users in tables and pages stay texts."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from illume_lightning.escaping import one_line, plain, tex
from illume_lightning.evaluation.scores import Score, ScoreSheet
from illume_lightning.evaluation.tables import latex, markdown
from illume_lightning.lit.contact_sheet import contact_sheet

HOSTILE = (
    *(
        '<script>alert("x")</script>',
        "<img src=x onerror=alert(1)>",
        "</p></figure>\"'><svg onload=1>",
        "&lt;b&gt;",
    ),
    *(
        "a | b || c",
        "one\ntwo\r\nthree\u2028four",
        "| --- |\n| a |",
        "`code` *bold* __under__ [a](javascript:b) ![i](x)",
    ),
    *(
        "\\input{/etc/passwd}",
        "\\end{tabular}\\write18{ls}",
        "100 % & #1 $x$ ~ ^ {_}",
        "\n\\bye % ",
        "a\x00b",
        "",
    ),
    *("[[x]]", "\\", "\\|", "_a_", "snake_case_name", "{0} {cells} %s", "javascript:alert(1)", "\u202eevil"),
)


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_cells(text: str) -> None:
    cell = plain(text)
    assert "<" not in cell and len(cell.splitlines()) <= 1
    assert not re.search(r"(?<!\\)(\\\\)*[|`*\[\]]", cell.replace("\\\\", "")), cell
    shown = re.sub(r"\\(.)", r"\1", cell).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    assert shown == " ".join(text.replace("\0", " ").split())


def test_words_stay_readable() -> None:
    assert plain("pixel_usage of runs/x, 3.5") == "pixel_usage of runs/x, 3.5"
    assert plain("_a_ __b__ c_") == r"\_a\_ \_\_b\_\_ c\_"
    assert one_line("a\u00a0b \n c") == "a\u00a0b c"


@pytest.mark.parametrize("text", HOSTILE)
def test_latex_cells(text: str) -> None:
    cell = tex(text)
    commands = set(re.findall(r"\\([a-zA-Z]+)", cell))
    assert commands <= {"textbackslash", "textasciitilde", "textasciicircum"}
    rest = re.sub(r"\\(text\w+\{\}|[_%&#${}])", "", cell)
    assert not set(rest) & set("\\%&#${}_^\n"), cell


def test_tables_of_scores_keep_their_shape() -> None:
    scores = tuple(Score(text, text, 0.5, 0.4, 0.6, 4, "share", {text: 0.1}) for text in HOSTILE)
    sheet = ScoreSheet("runs/\n\\bye|<b>", "mllm", 1, 0, "ab", "2026-01-02", 1.0, {}, scores, ())
    lines = markdown(sheet).splitlines()
    assert lines[0].startswith("runs/ \\\\bye\\|&lt;b&gt;")
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == len(HOSTILE) + 2
    assert {len(re.findall(r"(?<!\\)\|", row.replace("\\\\", ""))) for row in rows} == {7}
    tabular = latex(sheet).splitlines()
    assert tabular[0].startswith("% runs/ \\bye")
    assert sum(line.endswith("\\\\") for line in tabular) == len(HOSTILE) + 1
    assert {len(re.findall(r"(?<!\\)&", line)) for line in tabular if line.endswith("\\\\")} == {5}
    assert "".join(tabular).count(r"\end{tabular}") == 1


class Tags(HTMLParser):
    """The tags of a page, and its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[str, ...]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, tuple(name for name, _ in attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_contact_sheet_shows_words_as_words(tmp_path: Path) -> None:
    folder = tmp_path / '<b onclick="x">'
    folder.mkdir()
    name = 'a"><script>.png'
    Image.new("RGB", (8, 8)).save(folder / name, "PNG")

    def page(text: str) -> Tags:
        record = {
            "id": text or "x",
            "task": {"prompt": text},
            "text": text,
            "error": text,
            "pictures": [name],
        }
        edit = {"id": "2", "task": {"messages": [{"role": "user", "content": text}]}, "settings": {"seed": 3}}
        return Tags(contact_sheet([record, edit], folder))

    expected = page("x").found
    assert not {"script", "svg", "iframe"} & {tag for tag, _ in expected}
    for text in HOSTILE[:-1]:
        if text:
            found = page(text)
            assert found.found == expected, text
            assert text.replace("\r\n", "\n") in found.text.replace("\r\n", "\n")
