"""A whole model small enough to chat, generate and edit in a test."""

from pathlib import Path

import torch
from tiny import build_tiny
from tiny_mllm import build_mllm

from illume_lightning import Illume
from illume_lightning.data.text_tokenizer import TextTokenizer
from illume_lightning.data.worlds.shapes_conversations import prepare_shapes_tokenizer

SIZES = ((32, 32), (32, 64), (64, 32))


def build_illume(folder: Path, discrete_input: bool = False) -> Illume:
    """Untrained; its text tokenizer is written to a folder."""
    prepare_shapes_tokenizer(folder)
    text_tokenizer = TextTokenizer(folder)
    torch.manual_seed(0)
    vocabulary = text_tokenizer.vocabulary(64, 96, size_step=16)
    mllm = build_mllm(vocabulary=vocabulary, slot_grid=4, discrete_input=discrete_input)
    torch.nn.init.normal_(mllm.slot_embedding.weight)
    return Illume(mllm, text_tokenizer, build_tiny().eval(), sizes=SIZES, max_side=64, slots=6, context=2048)
