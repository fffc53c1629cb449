"""The page: its parts, what its handlers give to Gradio, and what the server refuses."""

import html
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

gr = pytest.importorskip("gradio", reason="the page needs Gradio: pip install 'illume-lightning[app]'")

from illume_lightning.app import chat_tab, picture_tabs  # noqa: E402
from illume_lightning.app.controls import read_sampling, sampling_controls  # noqa: E402
from illume_lightning.app.examples import Examples  # noqa: E402
from illume_lightning.app.history import History  # noqa: E402
from illume_lightning.app.page import Server, build_page  # noqa: E402
from illume_lightning.app.runner import picture_file, status, telling  # noqa: E402
from illume_lightning.app.studio import Studio  # noqa: E402
from illume_lightning.lit.illume import Illume  # noqa: E402
from illume_lightning.nn.token_sampling import SegmentSampling, TokenSampling  # noqa: E402

SETTINGS = ("dualvitok", 7, 1.0, 2048, 1.0, 2.0)
WORDS = (1.0, 0, 1.0)


def blocks(page: Any, kind: type) -> list[Any]:
    return [block for block in page.blocks.values() if isinstance(block, kind)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def address(studio: Studio) -> Iterator[str]:
    page = build_page(studio, Examples())
    yield Server(port=free_port(), max_upload_mb=1).open(page)
    page.close()


def test_controls_begin_at_the_defaults() -> None:
    defaults = TokenSampling(
        SegmentSampling(0.5, 20, 0.9), SegmentSampling(0.7, 300, 0.8), SegmentSampling(0.7, 900, 0.8), 1.25
    )
    with gr.Blocks():
        for_words = sampling_controls(defaults, 64, 500)
        for_pictures = sampling_controls(defaults, 64)
    assert read_sampling([control.value for control in for_words]) == (0, defaults)
    seed, drawn = read_sampling([control.value for control in for_pictures])
    assert (drawn.semantic, drawn.pixel, drawn.guidance) == (defaults.semantic, defaults.pixel, 1.25)
    with pytest.raises(ValueError, match="empty"):
        read_sampling([None, 1.0, 0, 1.0, 2.0])
    with pytest.raises(ValueError, match="top_p"):
        read_sampling([seed, 1.0, 0, 0.0, 2.0])


def test_the_page_offers_what_the_model_can_do(studio: Studio, illume: Illume) -> None:
    page = build_page(studio, Examples())
    assert [tab.label for tab in blocks(page, gr.Tab)] == ["Chat", "Generate", "Edit", "Reconstruct"]
    (size,) = blocks(page, gr.Dropdown)
    assert [name for name, _ in size.choices] == [f"{h} x {w}" for h, w in illume.prompts.sizes]
    assert not any(radio.visible for radio in blocks(page, gr.Radio)), "there is one decoder"
    jobs = [event for event in page.fns.values() if event.concurrency_id == "model"]
    assert len(jobs) == 5
    assert {event.concurrency_limit for event in jobs} == {1}
    words_only = Illume(illume.mllm, illume.text_tokenizer, sizes=illume.prompts.sizes, slots=2, context=64)
    assert [tab.label for tab in blocks(build_page(Studio(words_only), Examples()), gr.Tab)] == ["Chat"]


def test_errors_are_one_line_of_plain_text() -> None:
    with pytest.raises(gr.Error) as caught, telling():
        raise ValueError("the prompt holds <image>")
    assert caught.value.message == html.escape("the prompt holds <image>")
    assert caught.value.__cause__ is None
    for error in (RuntimeError("/srv/secret"), FileNotFoundError("/srv/secret")):
        with pytest.raises(gr.Error, match="log says why") as caught, telling():
            raise error
        assert "secret" not in caught.value.message


def test_the_gallery_fills_up(studio: Studio) -> None:
    news = list(picture_tabs.generate(studio, "a red circle", 1, 2, *SETTINGS))
    assert news[0] == ([], status("0 of 2 pictures", 0))
    made, line = news[-1]
    assert [caption for _, caption in made] == ["seed 7", "seed 8"]
    assert {Image.open(file).size for file, _ in made} == {(64, 32)}
    assert "aria-valuenow" not in line
    shown = [made for made, _ in news if isinstance(made, list)]
    assert [len(made) for made in shown] == [0, 1, 2], "pictures are sent when there are new ones"


def test_files_of_pictures_are_written_once_and_without_loss(picture: Image.Image) -> None:
    path = Path(picture_file(picture))
    written = path.stat()
    assert picture_file(picture.copy()) == str(path)
    assert path.stat() == written
    assert Image.open(path).tobytes() == picture.tobytes()
    assert [file.name for file in path.parent.iterdir()] == ["picture.png"]


def test_an_edit_and_a_reconstruction(studio: Studio, picture_path: Path, picture: Image.Image) -> None:
    *_, (result, _) = picture_tabs.edit(studio, str(picture_path), "remove the circle", *SETTINGS)
    assert Image.open(result).size == picture.size
    *_, (result, _) = picture_tabs.reconstruct(studio, str(picture_path))
    assert Image.open(result).size == picture.size
    with pytest.raises(ValueError, match="no picture yet"):
        next(picture_tabs.reconstruct(studio, None))


def test_a_conversation_is_shown_with_its_pictures(studio: Studio, picture_path: Path) -> None:
    history = History()
    value = {"text": "What is this?", "files": [str(picture_path)]}
    (asked,), box = chat_tab.ask(history, value)
    assert box is None
    assert Path(asked["content"][0]["path"]).is_file()
    assert asked["content"][1] == {"type": "text", "text": "What is this?"}
    shown = [
        messages for messages, _ in chat_tab.answer(studio, history, "dualvitok", 16, *SETTINGS[1:], *WORDS)
    ]
    assert shown[0] == [asked]
    question, answer = shown[-1]
    assert (question, answer["role"]) == (asked, "assistant")
    assert chat_tab.ask_again(history) == [asked]
    job = chat_tab.answer(studio, history, "dualvitok", 16, *SETTINGS[1:], *WORDS)
    next(job)
    assert chat_tab.forget(history) == []
    assert list(job) == [], "nobody waits for the answer"
    assert list(chat_tab.answer(studio, history, "dualvitok", 16, *SETTINGS[1:], *WORDS)) == []
    assert history.messages == []
    with pytest.raises(gr.Error, match="empty"):
        chat_tab.ask(history, {"text": "", "files": []})


def test_the_server_serves_only_its_own(address: str) -> None:
    with urllib.request.urlopen(address) as reply:
        page = reply.read().decode()
    assert "Content-Security-Policy" in page
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{address}gradio_api/file={Path(__file__)}")
    assert caught.value.code == 403


def test_large_uploads_are_refused(address: str) -> None:
    def upload(size: int) -> int:
        body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        body += b"0" * size + b"\r\n--x--\r\n"
        request = urllib.request.Request(f"{address}gradio_api/upload", body)
        request.add_header("Content-Type", "multipart/form-data; boundary=x")
        try:
            with urllib.request.urlopen(request) as reply:
                return int(reply.status)
        except urllib.error.HTTPError as error:
            return error.code

    assert upload(1000) == 200
    assert upload(2**20 + 1) == 413


def test_a_taken_port_is_an_error(studio: Studio, address: str) -> None:
    port = int(address.rstrip("/").rpartition(":")[2])
    with pytest.raises(OSError, match=f"127.0.0.1 port {port} .* choose another"):
        Server(port=port).open(build_page(studio, Examples()))
