"""What all tabs share: buttons that start and stop a job, the line that tells how far it is, and errors."""

import hashlib
import html
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any
from uuid import uuid4

import gradio as gr
import numpy as np
from PIL import Image

from illume_lightning.data.image import encode_png

QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""Options of events that only change the page."""

TELLING: dict[str, Any] = QUIET | {"queue": True, "concurrency_limit": None}
"""Options of those that may fail: Gradio shows errors of queued events alone."""

_MODEL = "model"  # jobs of this name wait for one another, on whichever tab


class Runner:
    """A tab's buttons that start and stop its job, and a line that tells how far it is; made where it is to stand.

    Args:
        name: on the button that starts.
        others: on further buttons beside it.
    """

    def __init__(self, name: str, *others: str) -> None:
        with gr.Row():
            self.start = gr.Button(name, variant="primary", min_width=100)
            self.cancel = gr.Button("Cancel", variant="stop", min_width=100, interactive=False)
            self.others = [gr.Button(other, min_width=100) for other in others]
        self.status = gr.HTML(status(""))

    def connect(
        self,
        triggers: Sequence[gr.events.Dependency],
        job: Callable[..., Iterator[Any]],
        inputs: Sequence[gr.Component],
        outputs: Sequence[gr.Component],
    ) -> list[gr.events.Dependency]:
        """Run a job in line for the model, with the buttons changed as long as it takes.

        Args:
            triggers: events that the job comes after, where they went well.
            job: yields values of ``outputs`` and of the status.
            inputs: of the job.
            outputs: of the job, without the status.

        Returns:
            The running job of each trigger, for what else comes after it or stops it.
        """
        line = [self.start, self.cancel, self.status]
        running = []
        for trigger in triggers:
            begun = trigger.success(partial(_line, True, "In line for the model"), None, line, **QUIET)
            running.append(
                begun.success(
                    _told(job),
                    list(inputs),
                    [*outputs, self.status],
                    concurrency_id=_MODEL,
                    concurrency_limit=1,
                    show_progress_on=self.status,
                    api_visibility="private",
                )
            )
            running[-1].success(partial(_line, False), None, line, **QUIET)
            # Also what comes after a cancelled job.
            running[-1].failure(partial(_line, False, "Stopped"), None, line, **QUIET)
        self.cancel.click(None, cancels=running)
        return running


def status(words: str, share: float | None = None) -> str:
    """The line that tells how far a job is.

    Args:
        words: plain text.
        share: of the work, 0 to 1, shown as a bar.
    """
    bar = ""
    if share is not None:
        done = round(100 * share)
        bar = f'<div class="bar" role="progressbar" aria-valuenow="{done}"><div style="width:{done}%"></div></div>'
    return f'<div class="progress-line" role="status"><p>{html.escape(words)}</p>{bar}</div>'


@contextmanager
def telling() -> Iterator[None]:
    """Show what the user can mend as one line; of all else only that it happened, for the log has the rest."""
    try:
        yield
    except ValueError as error:
        raise gr.Error(html.escape(str(error)), print_exception=False) from None
    except (RuntimeError, OSError) as error:
        raise gr.Error(
            "That failed on the server, whose log says why; the model can be used again"
        ) from error


def picture_file(image: Image.Image) -> str:
    """A file of a picture that the page may show, without loss; deleted with all others after some time.

    Gradio's own would be written anew, under the browser's eyes, each time the picture is shown again.
    """
    data = encode_png(np.asarray(image.convert("RGB")))
    path = Path(gr.utils.get_upload_folder(), hashlib.sha256(data).hexdigest(), "picture.png")
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(uuid4().hex)
        scratch.write_bytes(data)
        scratch.replace(path)
    return str(path)


def uploaded(path: str) -> Path:
    """A file that a visitor sent.

    Raises:
        ValueError: if it is any other: whoever writes requests by hand may name all files of the server.
    """
    folder = Path(gr.utils.get_upload_folder()).resolve()
    if "\0" in path or not Path(path).resolve().is_relative_to(folder) or not Path(path).is_file():
        raise ValueError("there is no such picture on the server, or no longer: add it again")
    return Path(path)


def _told(job: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    @wraps(job)
    def told(*values: Any) -> Iterator[Any]:
        with telling():
            yield from job(*values)

    return told


def _line(is_running: bool, words: str = "") -> tuple[gr.Button, gr.Button, str]:
    return gr.Button(interactive=not is_running), gr.Button(interactive=is_running), status(words)
