"""The page for a trained model, and the server that shows it."""

import logging
from dataclasses import dataclass
from typing import Any

import gradio as gr

from illume_lightning.app.chat_tab import chat_tab
from illume_lightning.app.examples import Examples
from illume_lightning.app.picture_tabs import edit_tab, generate_tab, reconstruct_tab
from illume_lightning.app.studio import Studio

log = logging.getLogger(__name__)

_SECONDS_KEPT = 24 * 3600  # of files of pictures
_SECONDS_BETWEEN = 3600  # looks for files to delete
_MOST_PAGES = 1000  # open ones whose conversations are kept

# Nothing is fetched from elsewhere, whatever is written into a conversation.
_HEAD = """\
<meta http-equiv="Content-Security-Policy" content="default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:">
"""
# The share buttons of pictures would send them to a public site.
_CSS = """\
.progress-line {min-height: 2.5rem}
.progress-line p {margin: 0; min-height: 1.6rem}
.progress-line .bar {height: .5rem; border-radius: .25rem; overflow: hidden; background: var(--neutral-200)}
.progress-line .bar div {height: 100%; background: var(--color-accent)}
button[aria-label="Share"] {display: none}
"""


@dataclass(frozen=True)
class Server:
    """Who sees the page, and how much they may ask of it.

    Args:
        host: address to listen on; 127.0.0.1 is for this machine alone, 0.0.0.0 for all that reach it.
        port: to listen on.
        max_upload_mb: largest file of a picture, in MiB.
        queue: most jobs that wait for the model; more are refused.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    max_upload_mb: int = 16
    queue: int = 16

    def open(self, page: gr.Blocks) -> str:
        """Show a page until it is closed; returns its address at once.

        Raises:
            OSError: if the port is taken.
        """
        page.queue(max_size=self.queue, api_open=False)
        try:
            _, address, _ = self._launch(page)
        except OSError as error:
            raise OSError(
                f"{self.host} port {self.port} can't be listened on: choose another --port"
            ) from error
        return str(address)

    def _launch(self, page: gr.Blocks) -> tuple[Any, str, str | None]:
        return page.launch(
            server_name=self.host,
            server_port=self.port,
            max_file_size=self.max_upload_mb * 2**20,
            theme=gr.themes.Default(),
            css=_CSS,
            head=_HEAD,
            state_session_capacity=_MOST_PAGES,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            share=False,
            ssr_mode=False,
            mcp_server=False,
            quiet=True,
            prevent_thread_lock=True,
        )

    def show(self, page: gr.Blocks) -> None:
        """Show a page until the process is stopped.

        Raises:
            OSError: if the port is taken.
        """
        address = self.open(page)
        try:
            log.info("open %s in a browser; Ctrl+C ends it", address)
            if self.host not in ("127.0.0.1", "localhost", "::1"):
                log.warning(
                    "%s: whoever reaches this machine can use the model, without a password", self.host
                )
            page.block_thread()
        except KeyboardInterrupt:  # before Gradio, which ends on one itself, waits for it
            page.close()


def build_page(studio: Studio, examples: Examples) -> gr.Blocks:
    """A tab for each thing the model can do.

    Args:
        studio: the model.
        examples: to click on.
    """
    with gr.Blocks(
        title="illume",
        analytics_enabled=False,
        delete_cache=(_SECONDS_BETWEEN, _SECONDS_KEPT),
        fill_width=True,
    ) as page:
        with gr.Tab("Chat"):
            chat_tab(studio, examples.questions)
        if studio.decoders:
            with gr.Tab("Generate"):
                generate_tab(studio, examples.prompts)
            with gr.Tab("Edit"):
                edit_tab(studio, examples.edits)
            with gr.Tab("Reconstruct"):
                reconstruct_tab(studio, examples.pictures)
        else:
            log.warning(
                "no tokenizer, so only words: give the DualViTok run of the model's codes for pictures"
            )
    return page
