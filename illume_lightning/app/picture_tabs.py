"""The tabs that make pictures: of words, of a picture and an instruction, and of a picture's codes."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import gradio as gr
from PIL import Image

from illume_lightning.app.controls import decoder_choice, read_sampling, sampling_controls
from illume_lightning.app.examples import EditExample
from illume_lightning.app.history import MAX_CHARACTERS
from illume_lightning.app.runner import QUIET, TELLING, Runner, picture_file, status, telling, uploaded
from illume_lightning.app.studio import Studio, read_picture
from illume_lightning.lit.illume import DecoderName

MOST_PICTURES = 8

_HEIGHT = 380
_GALLERY_HEIGHT = 740


def generate_tab(studio: Studio, examples: Sequence[str]) -> None:
    """Pictures of words."""
    prompts = studio.illume.prompts
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            prompt = gr.Textbox(label="What the picture shows", lines=3, max_length=MAX_CHARACTERS)
            with gr.Row():
                names = [f"{height} x {width}" for height, width in prompts.sizes]
                size = gr.Dropdown(
                    [(name, number) for number, name in enumerate(names)],
                    value=0,
                    label="Size",
                    info="Height x width",
                )
                count = gr.Slider(
                    1, MOST_PICTURES, 1, step=1, label="Pictures", info="One seed after the other"
                )
            runner = Runner("Generate")
            settings = _settings(studio, prompts.defaults.generate)
            if examples:
                gr.Examples([[words] for words in examples], [prompt], label="Examples")
        with gr.Column(scale=3):
            made = gr.Gallery(
                label="Pictures",
                object_fit="contain",
                columns=_columns(1),
                fit_columns=False,
                height=_GALLERY_HEIGHT,
                interactive=False,
            )
    count.change(lambda number: gr.Gallery(columns=_columns(number)), count, made, **QUIET)
    begun = gr.on([runner.start.click, prompt.submit], _begin, **QUIET)
    runner.connect([begun], partial(generate, studio), [prompt, size, count, *settings], [made])


def edit_tab(studio: Studio, examples: Sequence[EditExample]) -> None:
    """A changed picture beside the one it was made of."""
    with gr.Row():
        with gr.Column():
            original = _upload()
            instruction = gr.Textbox(label="What to change", max_length=MAX_CHARACTERS)
            runner = Runner("Edit")
        with gr.Column():
            result = gr.Image(label="Result", height=_HEIGHT, interactive=False)
            settings = _settings(studio, studio.illume.prompts.defaults.edit)
            if examples:
                rows = [[picture_file(image), words] for image, words in examples]
                gr.Examples(rows, [original, instruction], label="Examples", examples_per_page=3)
    begun = gr.on([runner.start.click, instruction.submit], _begin, **QUIET)
    runner.connect([begun], partial(edit, studio), [original, instruction, *settings], [result])


def reconstruct_tab(studio: Studio, examples: Sequence[Image.Image]) -> None:
    """A picture through codes and back."""
    names = {"dualvitok": "DualViTok", "diffusion": "Diffusion decoder"}
    with gr.Row():
        original = _upload()
        results = [
            gr.Image(label=names[decoder], height=_HEIGHT, interactive=False) for decoder in studio.decoders
        ]
    runner = Runner("Reconstruct")
    if examples:
        gr.Examples([[picture_file(image)] for image in examples], [original], label="Examples")
    begun = runner.start.click(_begin, **QUIET)
    runner.connect([begun], partial(reconstruct, studio), [original], results)


def generate(
    studio: Studio, prompt: str, size: int, count: int, decoder: DecoderName, *sampling: Any
) -> Iterator[tuple[Any, str]]:
    """The gallery as it fills, and how far it is."""
    seed, drawing = read_sampling(sampling)
    wanted = studio.illume.prompts.sizes[size]
    shown = -1
    for pictures in studio.generate(prompt, wanted, int(count), seed, drawing, decoder):
        there = len(pictures.made)
        line = status(f"{there} of {count} pictures" if there < count else "", _share(pictures.share))
        if there == shown:
            yield gr.skip(), line
        else:
            shown = there
            yield [(picture_file(image), f"seed {number}") for number, image in pictures.made], line


def edit(
    studio: Studio, file: str | None, instruction: str, decoder: DecoderName, *sampling: Any
) -> Iterator[tuple[Any, str]]:
    """The changed picture, and how far it is."""
    seed, drawing = read_sampling(sampling)
    for pictures in studio.edit(_picture(file), instruction, seed, drawing, decoder):
        result = picture_file(pictures.made[0][1]) if pictures.made else None
        yield result, status("" if pictures.made else "Making a picture", _share(pictures.share))


def reconstruct(studio: Studio, file: str | None) -> Iterator[tuple[Any, ...]]:
    """What each decoder makes of a picture's codes, one after the other."""
    for results in studio.reconstruct(_picture(file)):
        words = "" if len(results) == len(studio.decoders) else "Making a picture"
        files = [picture_file(results[name]) if name in results else None for name in studio.decoders]
        yield *files, status(words)


def _columns(count: int) -> int:
    """All pictures are seen at once, and as large as that allows."""
    return 2 if count <= 4 else 3


def _settings(studio: Studio, defaults: Any) -> list[Any]:
    """Decoder and sampling, closed at first."""
    with gr.Accordion("Settings", open=False):
        decoder = decoder_choice(studio)
        return [decoder, *sampling_controls(defaults, studio.illume.mllm.vocabulary.semantic_codes)]


def _upload() -> gr.Image:
    image = gr.Image(
        label="Picture",
        type="filepath",
        image_mode=None,  # Gradio only looks at its header
        sources=["upload", "clipboard"],
        height=_HEIGHT,
        buttons=[],
    )
    # What is no picture would otherwise end the job without a word.
    image.upload(_look_at, image, preprocess=False, **TELLING).failure(lambda: None, None, image, **QUIET)
    return image


def _look_at(file: Any) -> None:
    with telling():
        _picture(file.get("path") if isinstance(file, dict) else None)


def _picture(file: str | None) -> Image.Image:
    if file is None:
        raise ValueError("there is no picture yet: add one")
    return read_picture(uploaded(file))


def _share(share: float) -> float | None:
    """Nothing to show at the end."""
    return share if share < 1 else None


def _begin() -> None:
    """Nothing happens before the job."""
