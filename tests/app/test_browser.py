"""The page in a real browser: all tabs, Cancel, two users at once, and nothing fetched from elsewhere."""

import re
import shutil
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("gradio", reason="the page needs Gradio: pip install 'illume-lightning[app]'")
driver = pytest.importorskip(
    "playwright.sync_api", reason="the browser needs Playwright: pip install playwright"
)

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402
from test_page import free_port  # noqa: E402

from illume_lightning.app.examples import Examples  # noqa: E402
from illume_lightning.app.page import Server, build_page  # noqa: E402
from illume_lightning.app.studio import Studio  # noqa: E402
from illume_lightning.lit.illume import Event, Illume, Reply  # noqa: E402
from illume_lightning.lit.prompts import Chat, MadeImage, Task  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

EXAMPLES = 1
"""Pictures of examples on the tabs that have some."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the path"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with driver.sync_playwright() as playwright:
        # Containers lack what its sandbox needs; it sees only this page.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def address(studio: Studio, illume: Illume, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The page of a model that is slow enough to be cancelled."""
    run = illume.run

    def slow(*arguments: Any) -> Iterator[Any]:
        for event in run(*arguments):
            time.sleep(0.3 if event.picture else 0.01)
            yield event

    monkeypatch.setattr(illume, "run", slow)
    monkeypatch.setattr(Chat, "max_tokens", 100)
    page = build_page(
        studio, Examples(prompts=["a red circle"], edits=[(Image.new("RGB", (40, 40)), "make it blue")])
    )
    yield Server(port=free_port()).open(page)
    page.close()


@pytest.fixture
def elsewhere() -> Iterator[tuple[str, list[str]]]:
    """Another server's address, and what it is asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


@pytest.fixture
def requests() -> list[str]:
    return []


@pytest.fixture
def page(browser: Any, address: str, requests: list[str]) -> Iterator[Any]:
    yield open_page(browser, address, requests)
    hosts = {urlsplit(url).netloc for url in requests if not url.startswith(("data:", "blob:"))}
    assert hosts == {urlsplit(address).netloc}


def open_page(browser: Any, address: str, requests: list[str]) -> Any:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(30_000)
    # What the page's policy forbids is asked for, but never sent.
    page.on("requestfinished", lambda request: requests.append(request.url))
    page.on(
        "requestfailed", lambda request: requests.append(request.url) if request.failure != "csp" else None
    )
    page.goto(address)
    return page


def tab(page: Any, name: str) -> Any:
    """The part of the page that is seen under a tab."""
    page.get_by_role("tab", name=name, exact=True).click()
    return page.get_by_role("tabpanel").filter(visible=True)


def button(tab: Any, name: str) -> Any:
    return tab.get_by_role("button", name=name, exact=True)


def wait_until_idle(tab: Any, name: str) -> None:
    driver.expect(button(tab, name)).to_be_enabled(timeout=30_000)
    driver.expect(button(tab, "Cancel")).to_be_disabled()


def shown_sizes(part: Any, count: int) -> list[list[int]]:
    """Widths and heights of the pictures there, once there are so many and all are loaded."""
    images = part.locator("img")
    driver.expect(images).to_have_count(count)
    for image in images.all():
        driver.expect(image).not_to_have_js_property("naturalWidth", 0)
    return images.evaluate_all("all => all.map(i => [i.naturalWidth, i.naturalHeight])")


def test_generate(page: Any, illume: Illume) -> None:
    generate = tab(page, "Generate")
    generate.get_by_label("Size").click()
    options = generate.get_by_role("option").all_inner_texts()
    assert [text.strip(" \n✓") for text in options] == [f"{h} x {w}" for h, w in illume.prompts.sizes]
    generate.get_by_role("option", name="32 x 64").click()
    page.get_by_text("a red circle").first.click()
    driver.expect(generate.get_by_label("What the picture shows")).to_have_value("a red circle")
    generate.get_by_label("number input for Pictures").first.fill("2")
    button(generate, "Generate").click()
    driver.expect(generate.get_by_role("progressbar")).to_be_visible()
    assert shown_sizes(generate, 2) == [[64, 32]] * 2
    wait_until_idle(generate, "Generate")


def test_cancel(page: Any) -> None:
    generate = tab(page, "Generate")
    generate.get_by_label("What the picture shows").fill("a blue square")
    generate.get_by_label("number input for Pictures").first.fill("8")
    button(generate, "Generate").click()
    driver.expect(generate.get_by_role("progressbar")).to_be_visible()
    button(generate, "Cancel").click()
    driver.expect(generate.get_by_role("status")).to_have_text("Stopped")
    wait_until_idle(generate, "Generate")
    generate.get_by_label("number input for Pictures").first.fill("1")
    button(generate, "Generate").click()
    wait_until_idle(generate, "Generate")
    driver.expect(generate.locator("img")).to_have_count(1)


def test_chat(page: Any, picture_path: Path, elsewhere: tuple[str, list[str]]) -> None:
    other, asked = elsewhere
    chat = tab(page, "Chat")
    chat.locator("input[type=file]").first.set_input_files(picture_path)
    box = chat.get_by_placeholder("Say something")
    box.fill(f"What is this? ![leak]({other}/leak.png)")
    driver.expect(chat.locator(".thumbnail-item, .thumbnail-image")).not_to_have_count(0)
    box.press("Enter")
    driver.expect(chat.locator(".bot.message")).to_have_count(1)
    driver.expect(chat.locator(".user.message img[src*='gradio_api']")).to_have_count(1)
    wait_until_idle(chat, "Send")
    driver.expect(chat.locator("img[alt=leak]")).to_have_count(1)
    assert asked == []
    first = chat.locator(".bot.message").inner_text()
    box.fill("And now?")
    button(chat, "Send").click()
    driver.expect(chat.locator(".bot.message")).to_have_count(2)
    wait_until_idle(chat, "Send")
    assert chat.locator(".bot.message").first.inner_text() == first
    button(chat, "Answer again").click()
    driver.expect(button(chat, "Send")).to_be_disabled()
    wait_until_idle(chat, "Send")
    driver.expect(chat.locator(".bot.message")).to_have_count(2)


@pytest.mark.parametrize("started", [False, True])
def test_clear_while_an_answer_is_written(page: Any, started: bool) -> None:
    chat = tab(page, "Chat")
    chat.get_by_placeholder("Say something").fill("Go on")
    button(chat, "Send").click()
    driver.expect(chat.locator(".bot.message" if started else ".user.message")).to_have_count(1)
    button(chat, "Clear").last.click()
    driver.expect(chat.locator(".message")).to_have_count(0)
    wait_until_idle(chat, "Send")
    page.wait_for_timeout(1000)
    driver.expect(chat.locator(".message")).to_have_count(0)


def test_pictures_in_an_answer(page: Any, illume: Illume, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model makes none in a chat; what it would tell is played."""
    asked: list[Task] = []
    made = MadeImage(Image.new("RGB", (64, 32), "red"), (np.zeros(2, int), np.zeros(8, int)), (32, 64))

    def run(tasks: list[Task], decoder: str) -> Iterator[Event]:
        asked.extend(tasks)
        yield Event(0, "Here it is: ", 0.0, None)
        yield Event(0, "", 0.5, None)
        time.sleep(1.5)
        yield Event(0, " Well?", 0.0, Reply(("Here it is: ", made, " Well?")))

    monkeypatch.setattr(illume, "run", run)
    chat = tab(page, "Chat")
    for count in (1, 2):
        chat.get_by_placeholder("Say something").fill("Show me")
        button(chat, "Send").click()
        driver.expect(chat.get_by_role("progressbar")).to_be_visible()
        chat.get_by_placeholder("Say something").fill("Too early")
        chat.get_by_placeholder("Say something").press("Enter")
        driver.expect(page.get_by_text("an answer is being written").first).to_be_visible()
        driver.expect(chat.locator(".bot.message img")).to_have_count(count)
        driver.expect(chat.get_by_text("Well?")).to_have_count(count)
        wait_until_idle(chat, "Send")
    history = [item for message in asked[1].messages for item in message["content"]]
    assert {"type": "image", "image": made} in history


def test_mistakes_are_told(page: Any, tmp_path: Path) -> None:
    chat = tab(page, "Chat")
    button(chat, "Send").click()
    driver.expect(page.get_by_text("the message is empty")).to_be_visible()
    button(chat, "Answer again").click()
    driver.expect(page.get_by_text("there is no question yet")).to_be_visible()
    edit = tab(page, "Edit")
    button(edit, "Edit").click()
    driver.expect(page.get_by_text("there is no picture yet: add one")).to_be_visible()
    wait_until_idle(edit, "Edit")
    (tmp_path / "fake.png").write_bytes(b"no picture")
    edit.locator("input[type=file]").first.set_input_files(tmp_path / "fake.png")
    driver.expect(page.get_by_text("the picture can't be used: unreadable")).to_be_visible()
    driver.expect(edit.locator("img")).to_have_count(EXAMPLES)


def test_edit_and_reconstruct(page: Any, picture_path: Path) -> None:
    """Of an upload, and of an example."""
    for name in ("Edit", "Reconstruct"):
        part = tab(page, name)
        part.locator("input[type=file]").first.set_input_files(picture_path)
        driver.expect(part.locator("img")).to_have_count(1 + EXAMPLES)
        if name == "Edit":
            part.get_by_label("What to change").fill("remove the circle")
        button(part, name).click()
        assert shown_sizes(part, 2 + EXAMPLES)[:2] == [[90, 50]] * 2
        wait_until_idle(part, name)
        if name == "Edit":
            part.get_by_text("make it blue").click()
        else:
            part.locator("img").last.click()
        driver.expect(part.locator("img").first).to_have_js_property("naturalWidth", 40)
        button(part, name).click()
        driver.expect(part.locator("img").nth(1)).to_have_js_property("naturalWidth", 40)
        wait_until_idle(part, name)


def test_a_second_user_waits_and_sees_it(page: Any, browser: Any, address: str, requests: list[str]) -> None:
    other = open_page(browser, address, requests)
    parts = [tab(page, "Generate"), tab(other, "Generate")]
    for part, count in zip(parts, ("8", "1"), strict=True):
        part.get_by_label("What the picture shows").fill("a red circle")
        part.get_by_label("number input for Pictures").first.fill(count)
        button(part, "Generate").click()
        driver.expect(part.get_by_role("status")).to_have_text(re.compile("pictures|In line"))
    driver.expect(other.get_by_text(re.compile(r"queue: 1/1"))).to_be_visible()
    button(parts[0], "Cancel").click()
    driver.expect(parts[1].locator("img")).to_have_count(1)
    assert parts[0].locator("img").count() < 8
    other.close()
