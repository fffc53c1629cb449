"""The page in a real browser: no width overflows, by day and by night, and nothing is fetched."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="curves need matplotlib: pip install 'illume-lightning[report]'")
driver = pytest.importorskip(
    "playwright.sync_api", reason="the browser needs Playwright: pip install playwright"
)

from toy_records import sample, score, write_scores  # noqa: E402

from illume_lightning.report.page import write_report  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the path"),
]

TOO_WIDE = """() => [...document.querySelectorAll('body *')]
    .filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.wide, svg, pre'))
    .map(e => e.outerHTML.slice(0, 100))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with driver.sync_playwright() as playwright:
        # Containers lack what its sandbox needs; it sees only this page.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_nothing_overflows_or_is_fetched(folder: Path, root: Path, browser: Any, width: int) -> None:
    pictures = ["pictures/a.png"] * 3 + [f"pictures/{'gone' * 40}.png"]
    samples = [sample("editing", prompt="x" * 300, given=pictures, answer="y" * 300, expected="z " * 99)]
    scores = [score(f"editing_{'long' * 12}", f"name_{'x' * 40}", 0.5, **{f"other_{'w' * 30}": 0.1})]
    write_scores(root, "mllm_stage3", scores, samples)
    page = browser.new_page(viewport={"width": width, "height": 800})
    seen: list[str] = []
    page.on("request", lambda request: seen.append(request.url))
    page.on("console", lambda message: seen.append(message.text))
    page.goto(write_report(folder)[0].as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate(TOO_WIDE) == []
    assert [url for url in seen[1:] if not url.startswith("data:")] == []
    page.close()


def test_night_is_dark_and_paper_is_white(folder: Path, browser: Any) -> None:
    page = browser.new_page(color_scheme="dark")
    page.goto(write_report(folder)[0].as_uri())

    def brightness(style: str) -> int:
        shown = page.evaluate(f"getComputedStyle(document.body).{style}")
        return sum(map(int, re.findall(r"\d+", shown)[:3]))

    assert brightness("backgroundColor") < 150 < 600 < brightness("color")
    page.emulate_media(media="print")
    assert brightness("backgroundColor") == 765 and brightness("color") == 0
    page.close()
