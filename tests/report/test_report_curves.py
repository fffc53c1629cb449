"""Curves as parts of a page."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

pytest.importorskip("matplotlib", reason="curves need matplotlib: pip install 'illume-lightning[report]'")

from illume_lightning.report.curves import Line, Panel, draw

POINTS = [(10, 5.0), (20, 1.0), (30, 0.1), (40, 0.05)]


def panel(title: str = "Loss") -> Panel:
    lines = [
        Line("first", POINTS, 0),
        Line("held-out", POINTS[:1], 0, is_held_out=True),
        Line("b", POINTS, 1),
    ]
    return Panel(title, lines, [(0, "1"), (20, "2")], is_log=True, until=60)


def test_a_curve_takes_the_pages_colours_and_holds_no_text() -> None:
    svg = draw(panel(), "c1")
    ElementTree.fromstring(svg.replace("<svg ", '<svg xmlns:xlink="http://www.w3.org/1999/xlink" ', 1))
    assert {"var(--line0)", "var(--line1)", "var(--soft)", "var(--rule)"} <= set(
        re.findall(r"var\([^)]+\)", svg)
    )
    assert "#01fe" not in svg and "<text" not in svg and "<metadata" not in svg


def test_names_of_two_curves_never_meet_and_curves_repeat() -> None:
    first, second = draw(panel(), "c1"), draw(panel(), "c2")
    assert not set(re.findall(r' id="([^"]+)"', first)) & set(re.findall(r' id="([^"]+)"', second))
    assert first == draw(panel(), "c1")


def test_a_title_is_a_label_that_stays_text() -> None:
    assert 'aria-label="a &lt;b> &quot;c&quot; &amp; d"' in draw(panel('a <b> "c" & d'), "c1")


def test_one_point_is_drawn() -> None:
    assert "<use" in draw(Panel("PSNR", [Line("one", [(5, 2.0)], 0)]), "c1")
