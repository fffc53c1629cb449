"""Sliders of a task's sampling, and what they say."""

from collections.abc import Sequence
from typing import Any

import gradio as gr

from illume_lightning.app.studio import Studio
from illume_lightning.nn.token_sampling import SegmentSampling, TokenSampling

PIXEL_PER_SEMANTIC = 3
"""Pixel codes drawn from for each semantic one (official release)."""

_LIKELIEST = "0: always the likeliest"
_ALL = "0: any"


def sampling_controls(
    defaults: TokenSampling, num_codes: int, num_words: int = 0
) -> list[gr.Number | gr.Slider]:
    """Seed and sliders that begin at a task's defaults; ``read_sampling`` takes their values in order.

    Args:
        defaults: of the task.
        num_codes: size of the semantic codebook, the largest top-k.
        num_words: text tokens, the largest top-k of words; without it there are no sliders for words.
    """
    seed = gr.Number(
        0, label="Seed", precision=0, minimum=0, maximum=2**53, info="The same seed, the same answer"
    )
    pictures = _segment("Pictures", defaults.semantic, num_codes)
    guidance = gr.Slider(
        0,
        10,
        defaults.guidance,
        step=0.05,
        label="Guidance",
        info="1 is none; more keeps closer to the words",
    )
    if not num_words:
        return [seed, *pictures, guidance]
    return [seed, *pictures, guidance, *_segment("Words", defaults.text, num_words)]


def read_sampling(values: Sequence[Any]) -> tuple[int, TokenSampling]:
    """Seed and settings out of the values of ``sampling_controls``.

    Raises:
        ValueError: if one is empty or out of range.
    """
    if None in values:
        raise ValueError("one of the settings is empty: give it a number")
    seed, temperature, top_k, top_p, guidance, *words = values
    semantic = SegmentSampling(temperature, int(top_k), top_p)
    pixel = SegmentSampling(temperature, PIXEL_PER_SEMANTIC * int(top_k), top_p)
    text = SegmentSampling(words[0], int(words[1]), words[2]) if words else TokenSampling().text
    return int(seed), TokenSampling(text, semantic, pixel, guidance)


def decoder_choice(studio: Studio) -> gr.Radio:
    """What makes the pictures; only seen where there is a choice."""
    names = {"dualvitok": "DualViTok", "diffusion": "diffusion, twice the size"}
    return gr.Radio(
        [(names[name], name) for name in studio.decoders],
        value="dualvitok",
        label="Decoder",
        visible=len(studio.decoders) > 1,
    )


def _segment(name: str, sampling: SegmentSampling, num_tokens: int) -> list[gr.Slider]:
    return [
        gr.Slider(0, 2, sampling.temperature, step=0.05, label=f"{name}: temperature", info=_LIKELIEST),
        gr.Slider(
            0, max(num_tokens, sampling.top_k), sampling.top_k, step=1, label=f"{name}: top-k", info=_ALL
        ),
        gr.Slider(0.01, 1, sampling.top_p, step=0.01, label=f"{name}: top-p", info="1: any"),
    ]
