"""The vocabulary that a published folder's tokenizer stands for."""

import json
import re
from dataclasses import replace
from pathlib import Path

from illume_lightning.vocabulary import MARKERS, Vocabulary


def vocabulary_from(folder: str | Path, num_rows: int) -> Vocabulary:
    """The vocabulary of a folder's ``tokenizer.json``.

    Args:
        folder: holds it.
        num_rows: of the embedding; those beyond the last token are unused.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it lacks vision tokens, or they don't stand in the published order.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: give a folder with a tokenizer that knows the vision tokens.")
    ids = {
        token["content"]: token["id"]
        for token in json.loads(path.read_text(encoding="utf-8")).get("added_tokens", [])
    }
    heights = sorted(int(found[1]) for text in ids if (found := re.fullmatch(r"<height_(\d+)>", text)))
    semantic, pixel = (sum(text.startswith(f"<|image_level{level}_") for text in ids) for level in (0, 1))
    if MARKERS[0] not in ids or not heights or not semantic or not pixel:
        raise ValueError(f"{path} has no vision tokens: give the tokenizer that was extended by them.")
    vocabulary = Vocabulary(ids[MARKERS[0]], semantic, pixel, heights[0], len(heights))
    for expected, text in enumerate(vocabulary.tokens(), vocabulary.num_text):
        if ids.get(text) != expected:
            raise ValueError(f"{path} has {text} at {ids.get(text)}, its published place is {expected}.")
    if num_rows < vocabulary.size:
        raise ValueError(f"{path} has {vocabulary.size:,} tokens, the embedding {num_rows:,} rows.")
    return replace(vocabulary, num_unused=num_rows - vocabulary.size)
