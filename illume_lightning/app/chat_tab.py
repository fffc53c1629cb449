"""The tab to talk on: words that come as they are written, pictures in between."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import gradio as gr
from PIL import Image

from illume_lightning.app.controls import decoder_choice, read_sampling, sampling_controls
from illume_lightning.app.examples import Question
from illume_lightning.app.history import History
from illume_lightning.app.runner import QUIET, TELLING, Runner, picture_file, status, telling, uploaded
from illume_lightning.app.studio import Studio, read_picture
from illume_lightning.lit.illume import DecoderName
from illume_lightning.lit.prompts import Chat, MadeImage

MOST_TOKENS = 2048

Messages = list[dict[str, Any]]
"""What the conversation shows."""


def chat_tab(studio: Studio, examples: Sequence[Question]) -> None:
    """The tab; made where it is to stand.

    Args:
        studio: the model.
        examples: to click on.
    """
    illume = studio.illume
    history = gr.State(History())
    with gr.Row():
        with gr.Column(scale=3):
            shown = gr.Chatbot(label="Conversation", height=520, feedback_options=None, buttons=["copy"])
            box = gr.MultimodalTextbox(
                file_types=["image"],
                file_count="multiple",
                show_label=False,
                placeholder="Say something, with pictures or without",
                submit_btn=False,
            )
            runner = Runner("Send", "Answer again", "Clear")
            again, clear = runner.others
        with gr.Column(scale=1, min_width=280):
            with gr.Accordion("Settings", open=False):
                decoder = decoder_choice(studio)
                longest = gr.Slider(
                    1,
                    MOST_TOKENS,
                    Chat.max_tokens,
                    step=1,
                    label="Longest answer",
                    info="In tokens: max_tokens",
                )
                vocabulary = illume.mllm.vocabulary
                defaults = illume.prompts.defaults.chat
                sampling = sampling_controls(defaults, vocabulary.semantic_codes, vocabulary.num_text)
            if examples:
                gr.Examples(
                    [[_box(*question)] for question in examples], [box], label="Examples", examples_per_page=4
                )
    asked = gr.on([runner.start.click, box.submit], ask, [history, box], [shown, box], **TELLING)
    asked_again = again.click(ask_again, history, shown, **TELLING)
    inputs = [history, decoder, longest, *sampling]
    running = runner.connect([asked, asked_again], partial(answer, studio), inputs, [shown])
    for job in running:
        # Also after a cancelled one: what is shown is what the model will be told.
        job.then(messages, history, shown, **QUIET)
    gr.on([clear.click, shown.clear], forget, history, shown, cancels=running, **QUIET)


def ask(history: History, value: dict[str, Any]) -> tuple[Messages, None]:
    """Put what is in the box into the conversation, and empty the box."""
    with telling():
        history.ask(value["text"], [read_picture(uploaded(file)) for file in value["files"]])
        return messages(history), None


def ask_again(history: History) -> Messages:
    """Throw the last answer away."""
    with telling():
        history.ask_again()
        return messages(history)


def forget(history: History) -> Messages:
    """Begin anew."""
    history.exchanges.clear()
    return []


def answer(
    studio: Studio, history: History, decoder: DecoderName, longest: int, *sampling: Any
) -> Iterator[tuple[Messages, str]]:
    """The conversation as the answer to its last question grows, and how far it is; ends when it is forgotten."""
    seed, settings = read_sampling(sampling)
    if not history.exchanges:
        return
    before, exchange = messages(history), history.exchanges[-1]
    for share in studio.answer(history, seed, settings, int(longest), decoder):
        if not history.exchanges:
            return
        growing = [_message("assistant", exchange.answer)] if exchange.answer else []
        yield [*before, *growing], status("Making a picture", share) if share else status("Writing")
    yield messages(history), status("" if exchange.answer else "The model has nothing to say")


def messages(history: History) -> Messages:
    """A conversation as Gradio shows it."""
    shown = []
    for exchange in history.exchanges:
        shown.append(_message("user", [*exchange.images, *([exchange.text] if exchange.text else [])]))
        if exchange.answer:
            shown.append(_message("assistant", exchange.answer))
    return shown


def _message(role: str, parts: Sequence[str | Image.Image | MadeImage]) -> dict[str, Any]:
    content: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        else:
            image = part.image if isinstance(part, MadeImage) else part
            content.append(
                {"path": picture_file(image), "alt_text": f"picture, {image.width} x {image.height}"}
            )
    return {"role": role, "content": content}


def _box(text: str, image: Image.Image | None) -> dict[str, Any]:
    """A question as it stands in the box."""
    return {"text": text, "files": [] if image is None else [picture_file(image)]}
