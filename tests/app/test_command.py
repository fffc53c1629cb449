"""The command that shows the page."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import cli
from illume_lightning.lit.illume import Illume

ROOT = Path(__file__).parents[2]


def test_help_needs_no_heavy_import() -> None:
    code = (
        "import sys, cli\ntry: cli.main(['app', '--help'])\nexcept SystemExit as stop: assert not stop.code\n"
        "assert not {'torch', 'gradio'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--max_upload_mb" in done.stdout


def test_without_gradio_the_way_to_get_it_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit):
        cli.main(["app", "nowhere"])
    assert "pip install 'illume-lightning[app]'" in capsys.readouterr().err


def test_options_reach_the_model_and_the_server(illume: Illume, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio", reason="the page needs Gradio: pip install 'illume-lightning[app]'")
    from illume_lightning.app.page import Server

    seen: dict[str, Any] = {}

    def load(*arguments: Any, **options: Any) -> Illume:
        seen.update(arguments=arguments, options=options)
        return illume

    monkeypatch.setattr(Illume, "from_run", load)
    monkeypatch.setattr(Server, "show", lambda server, page: seen.update(server=server))
    options = (
        "--tokenizer tok --slots 4 --context 99 --port 7999 --queue 3 --dtype bfloat16 --max_upload_mb 2"
    )
    cli.main(["app", "run", *options.split()])
    run, tokenizer, decoder, device, dtype = seen["arguments"]
    assert (run, tokenizer, decoder, device, str(dtype)) == ("run", "tok", None, "auto", "torch.bfloat16")
    assert seen["options"] == {"slots": 4, "context": 99}
    assert seen["server"] == Server("127.0.0.1", 7999, 2, 3)


@pytest.mark.slow
def test_an_interrupt_ends_it() -> None:
    pytest.importorskip("gradio", reason="the page needs Gradio: pip install 'illume-lightning[app]'")
    code = (
        "import gradio as gr, logging; from illume_lightning.app.page import Server; from test_page import free_port\n"
        "logging.basicConfig(level=logging.INFO, format='%(message)s')\n"
        "with gr.Blocks(analytics_enabled=False) as page: gr.HTML('x')\n"
        "Server(port=free_port()).show(page)"
    )
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    lines = iter(process.stderr.readline, "")
    assert any(line.startswith("open http://127.0.0.1:") for line in lines)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
