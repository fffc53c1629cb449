"""Requests that no browser would send: what the page's server tells and takes."""

import html
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

gr = pytest.importorskip("gradio", reason="the page needs Gradio: pip install 'illume-lightning[app]'")

from test_page import free_port  # noqa: E402

from illume_lightning.app.examples import Examples  # noqa: E402
from illume_lightning.app.history import MAX_CHARACTERS, MAX_EXCHANGES, MAX_PICTURES, Exchange, History  # noqa: E402
from illume_lightning.app.page import Server, build_page  # noqa: E402
from illume_lightning.app.studio import Studio  # noqa: E402
from illume_lightning.nn.token_sampling import TokenSampling  # noqa: E402

SECRET = "this is nobody's business"


GENERATE = ["a star", 0, 1, "dualvitok", 0, 1.0, 0, 1.0, 1.0]
JOBS = ("answer", "answer again", "generate", "edit", "reconstruct")


class Client:
    """A visitor who speaks to the server directly."""

    def __init__(self, address: str, page: Any) -> None:
        self.address, self.page = address, page
        self.count = 0

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(self.address + path, timeout=20) as reply:
                return int(reply.status), reply.read().decode(errors="replace")
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(errors="replace")

    def post(self, path: str, body: Any) -> tuple[int, str]:
        request = urllib.request.Request(self.address + path, json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=20) as reply:
                return int(reply.status), reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def call(self, name: str, data: list[Any], session: str = "") -> dict[str, Any]:
        """What the event of a handler's name answers at last."""
        self.count += 1
        session = session or f"session{self.count}"
        jobs = [number for number, event in self.page.fns.items() if event.concurrency_id == "model"]
        numbers = [number for number, event in self.page.fns.items() if event.name == name]
        numbers += [jobs[JOBS.index(name)]] if name in JOBS else []
        body = {"data": data, "fn_index": numbers[0], "session_hash": session}
        status, text = self.post("gradio_api/queue/join", body)
        if status != 200:
            return {"success": False, "output": {"error": text}}
        with urllib.request.urlopen(
            f"{self.address}gradio_api/queue/data?session_hash={session}", timeout=60
        ) as lines:
            for line in lines:
                message = json.loads(line[5:]) if line.startswith(b"data:") else {}
                if message.get("msg") == "process_completed":
                    return dict(message)
        raise AssertionError("no answer")

    def upload(self, name: str, content: bytes) -> Any:
        body = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
        request = urllib.request.Request(
            f"{self.address}gradio_api/upload", body + content + b"\r\n--x--\r\n"
        )
        request.add_header("Content-Type", "multipart/form-data; boundary=x")
        with urllib.request.urlopen(request, timeout=20) as reply:
            return json.loads(reply.read())[0]


@pytest.fixture
def client(studio: Studio, picture: Image.Image) -> Iterator[Client]:
    examples = Examples(
        questions=[("What is this?", picture)], prompts=["a star"], edits=[(picture, "turn it")]
    )
    page = build_page(studio, examples)
    yield Client(Server(port=free_port(), max_upload_mb=1).open(page), page)
    page.close()


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    (tmp_path / "secret.txt").write_text(SECRET)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "secret.png")
    return tmp_path / "secret.txt"


def test_no_file_of_the_server_is_told(client: Client, secret: Path) -> None:
    uploaded = Path(client.upload("mine.png", b"mine"))
    assert client.get(f"gradio_api/file={uploaded}") == (200, "mine")
    os.symlink(secret, uploaded.parent / "link.png")
    up = "/".join([".."] * 20)
    encoded = up.replace("..", "%2e%2e").replace("/", "%2f")
    paths = [
        *(f"gradio_api/file={secret}", f"gradio_api/file={secret.parent}/", "gradio_api/file=/etc/passwd"),
        *(f"gradio_api/file={uploaded.parent}/{up}{secret}", f"gradio_api/file={up}{secret}"),
        *(
            f"gradio_api/file={encoded}{secret}",
            f"gradio_api/file={uploaded.parent}/%2e%2e/%2e%2e/%2e%2e{secret}",
        ),
        *(
            f"gradio_api/file={uploaded.parent}/link.png",
            f"gradio_api/file=file://{secret}",
            "gradio_api/file=.",
        ),
        *("gradio_api/file=cli.py", "gradio_api/file=README.md", f"gradio_api/file={Path(__file__)}"),
        *(
            f"static/{up}{secret}",
            f"assets/{up}{secret}",
            f"svelte/{up}{secret}",
            f"static/{encoded}{secret}",
        ),
        *(
            f"file={secret}",
            f"file/{secret}",
            f"gradio_api/stream/{secret}",
            f"gradio_api/deep_link?path={secret}",
        ),
        *(f"gradio_api/file=%00{secret}", f"gradio_api/file={secret}%00.png", "gradio_api/file=//etc/passwd"),
        *(
            "gradio_api/file=/proc/self/environ",
            "gradio_api/file=http://127.0.0.1:1/a",
            "gradio_api/upload_progress",
        ),
    ]
    for path in paths:
        status, text = client.get(path)
        assert status in (307, 400, 401, 403, 404, 405, 422, 500) or path.startswith(
            "gradio_api/deep_link"
        ), (path, status)
        assert SECRET not in text and "root:" not in text, path
        assert "Traceback" not in text, path


@pytest.mark.parametrize("has_meta", [True, False])
def test_no_file_of_the_server_is_taken_for_an_upload(client: Client, secret: Path, has_meta: bool) -> None:
    for path in (
        str(secret.with_name("secret.png")),
        "/etc/passwd",
        "/dev/zero",
        f"http://127.0.0.1:1/{secret.name}",
    ):
        file = {"path": path} | ({"meta": {"_type": "gradio.FileData"}} if has_meta else {})
        box = {"text": "What is this?", "files": [file]}
        for name, data in (("_look_at", [file]), ("reconstruct", [file]), ("ask", [None, box])):
            answer = client.call(name, data)
            assert answer["success"] is False, (name, path)
            told = json.dumps(answer)
            assert SECRET not in told and "Traceback" not in told


def test_what_is_uploaded_is_looked_at_with_care(client: Client) -> None:
    bomb = Path(client.upload("bomb.png", b""))
    Image.new("1", (10_000, 6_000)).save(bomb)
    files = {
        "too many pixels": str(bomb),
        "unreadable": client.upload("a.png", b"<svg onload=alert(1)>"),
        "unreadable; give": client.upload(
            "a.svg", b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>"
        ),
        "can't be used": client.upload("..%2f..%2fevil.png", b"\x89PNG\r\n\x1a\n"),
    }
    for reason, path in files.items():
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        answer = client.call("_look_at", [file])
        assert answer["success"] is False
        told = html.unescape(answer["output"]["error"])
        assert reason in told and path not in told and len(told) < 300
        assert Path(path).parent.parent == bomb.parent.parent, "a name leads nowhere else"


def test_long_texts_and_wild_settings_are_refused(client: Client) -> None:
    wild = {0: "x" * (MAX_CHARACTERS + 1), 1: 99, 2: 10**9, 3: "none", 5: -1, 6: 10**9, 7: 0, 8: 1e9}
    for place, value in wild.items():
        answer = client.call("generate", [*GENERATE[:place], value, *GENERATE[place + 1 :]])
        assert answer["success"] is False, value
        assert len(json.dumps(answer)) < 2000
    assert client.call("generate", GENERATE)["success"] is True, "the model is free again"


def test_a_full_queue_takes_no_more(studio: Studio) -> None:
    page = build_page(studio, Examples())
    client = Client(Server(port=free_port(), queue=2).open(page), page)
    number = [n for n, event in page.fns.items() if event.concurrency_id == "model"][JOBS.index("generate")]
    answers = []
    with studio._is_free:  # the model is at work
        for session in range(8):
            body = {"data": GENERATE, "fn_index": number, "session_hash": f"s{session}"}
            answers.append(client.post("gradio_api/queue/join", body))
    page.close()
    refused = [text for status, text in answers if status == 503]
    assert answers[0][0] == 200 and len(refused) >= 5
    assert all("full" in text.lower() and len(text) < 200 for text in refused)


def test_sessions_are_apart(client: Client) -> None:
    assert client.call("ask", [None, {"text": "my secret", "files": []}], "one")["success"]
    mine, others = (client.call("messages", [None], session) for session in ("one", "two"))
    assert "my secret" in json.dumps(mine)
    assert "my secret" not in json.dumps(others)
    forged = {"exchanges": [{"text": "my secret"}]}
    assert "my secret" not in json.dumps(client.call("messages", [forged], "three"))


def test_a_message_has_limits() -> None:
    history, image = History(), Image.new("RGB", (16, 16))
    with pytest.raises(ValueError, match="4,001 characters: 4,000 is the most"):
        history.ask("x" * (MAX_CHARACTERS + 1))
    with pytest.raises(ValueError, match="9 pictures: 8 is the most"):
        history.ask("look", [image] * (MAX_PICTURES + 1))
    history.exchanges = [Exchange("a", answer=("b",)) for _ in range(MAX_EXCHANGES)]
    with pytest.raises(ValueError, match="64 questions, which is the most: clear it"):
        history.ask("and?")


def test_prompts_have_a_length(studio: Studio, picture: Image.Image) -> None:
    with pytest.raises(ValueError, match="100,000 characters"):
        studio.generate("x" * 100_000, (32, 32), 1, 0, TokenSampling())
    with pytest.raises(ValueError, match="100,000 characters"):
        studio.edit(picture, "x" * 100_000, 0, TokenSampling())


@pytest.mark.parametrize(("host", "warns"), [("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)])
def test_others_are_let_in_only_with_a_warning(
    host: str, warns: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Page:
        def block_thread(self) -> None: ...

    monkeypatch.setattr(Server, "open", lambda *_: "http://there/")
    Server(host=host).show(Page())  # type: ignore[arg-type]
    assert ("without a password" in caplog.text) is warns
    assert Server().host == "127.0.0.1"
