"""The text tokenizer: words to ids and back, and where the ids of vision begin.

Any fast tokenizer of Hugging Face serves, read from its `tokenizer.json` alone; Qwen2.5's is the official
release's. For worlds that have none, `train_tokenizer` makes one.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from illume_lightning.data.part import write_text
from illume_lightning.vocabulary import MARKERS, Vocabulary

FILE = "tokenizer.json"
START_OF_TURN, END_OF_TURN, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"

_SPECIAL = (END_OF_TEXT, START_OF_TURN, END_OF_TURN)
_NUM_BYTES = 256


class TextTokenizer:
    """The text tokenizer of a folder.

    It is read when first needed, and a copy in another process reads it again: sending one costs nothing.

    Args:
        folder: holds `tokenizer.json`. The published tokenizer that is extended by vision tokens may be given
            as well as the one it was made from.

    Raises:
        FileNotFoundError: if there is no such file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / FILE).is_file():
            raise FileNotFoundError(
                f"no text tokenizer: {self.folder / FILE} is missing; give the folder of a Hugging Face model "
                "such as Qwen2.5, or train a tokenizer for a world: `illume prepare shapes-tokenizer`, "
                "`illume prepare emoji-tokenizer`"
            )

    def __reduce__(self) -> tuple[type["TextTokenizer"], tuple[Path]]:
        return TextTokenizer, (self.folder,)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with nothing added.

        All of it is ordinary text: "<|im_start|>" or "<height_64>" in it is split into pieces like any other
        word, so that nobody can type a turn or a picture. The official release makes tokens of them.

        Raises:
            ValueError: if it holds a lone surrogate.
        """
        try:
            return self._plain.encode(text, add_special_tokens=False).ids
        except TypeError as error:  # what the library calls it
            raise ValueError(
                f"the text holds half a character, which no file of UTF-8 has: {text[:80]!a}"
            ) from error

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, with the special tokens; ids that the file does not know, such as vision's, are left out."""
        return self._full.decode(list(ids), skip_special_tokens=False)

    @cached_property
    def num_text(self) -> int:
        """Number of text tokens: the first id that is free for vision, or where the file's vision tokens begin."""
        return self._ids.get(MARKERS[0], max(self._ids.values()) + 1)

    @cached_property
    def start_of_turn(self) -> int:
        """Id of <|im_start|>; ValueError if there is none."""
        return self._special(START_OF_TURN)

    @cached_property
    def end_of_turn(self) -> int:
        """Id of <|im_end|>, which also ends a generated answer; ValueError if there is none."""
        return self._special(END_OF_TURN)

    @cached_property
    def end_of_text(self) -> int:
        """Id of <|endoftext|>, which serves as padding; ValueError if there is none."""
        return self._special(END_OF_TEXT)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of all that decides the ids of a text; the format of the file and vision do not count."""
        content = json.loads((self.folder / FILE).read_text(encoding="utf-8"))
        merges = content["model"].get("merges", [])  # pairs, or in older files "left right"
        described = {
            "vocabulary": sorted((id, text) for text, id in self._ids.items() if id < self.num_text),
            "merges": [pair.split(" ") if isinstance(pair, str) else pair for pair in merges],
            "normalizer": content.get("normalizer"),
            "pre_tokenizer": content.get("pre_tokenizer"),
        }
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    def vocabulary(
        self, semantic_codes: int, pixel_codes: int, size_step: int = 64, num_sizes: int = 16
    ) -> Vocabulary:
        """The unified vocabulary of this text and two codebooks.

        Raises:
            ValueError: if the file has vision tokens and they do not stand where the vocabulary has them; names
                the first.
        """
        vocabulary = Vocabulary(self.num_text, semantic_codes, pixel_codes, size_step, num_sizes)
        has_vision = MARKERS[0] in self._ids
        for expected, text in enumerate(vocabulary.tokens(), self.num_text):
            found = self._ids.get(text)
            if found != (expected if has_vision else None):
                stands = "is missing" if found is None else f"has id {found}"
                raise ValueError(f"{self._collision}: {text} {stands}, the vocabulary has it at {expected}")
        for text, found in self._ids.items():
            if found >= vocabulary.size:
                raise ValueError(f"{self._collision}: {text} has id {found}, after the last code")
        return vocabulary

    @property
    def _collision(self) -> str:
        return (
            f"vision tokens of {self.folder / FILE} are not those of these codebooks; take the tokenizer without "
            f"vision tokens, or the codebook sizes it was made for"
        )

    @cached_property
    def _full(self) -> Tokenizer:
        return Tokenizer.from_file(str(self.folder / FILE))

    @cached_property
    def _plain(self) -> Tokenizer:
        """The same without added tokens, special or not: none of them can be typed."""
        plain = Tokenizer(self._full.model)
        if self._full.normalizer is not None:
            plain.normalizer = self._full.normalizer
        if self._full.pre_tokenizer is not None:
            plain.pre_tokenizer = self._full.pre_tokenizer
        for text in _SPECIAL:
            if self._ids.get(text) in plain.encode(text, add_special_tokens=False).ids:
                raise ValueError(
                    f"{self.folder / FILE} makes the special token {text} of plain text, so a user could type it; "
                    f"take a byte-level BPE tokenizer, such as Qwen2.5's"
                )
        return plain

    @cached_property
    def _ids(self) -> dict[str, int]:
        return self._full.get_vocab(with_added_tokens=True)

    def _special(self, text: str) -> int:
        if text not in self._ids:
            raise ValueError(
                f"{self.folder / FILE} has no token {text}, which the chat format needs; take a tokenizer that has "
                f"{', '.join(_SPECIAL)}, such as Qwen2.5's, or add them to it"
            )
        return self._ids[text]


def train_tokenizer(texts: Iterable[str], folder: str | Path, vocab_size: int = 512) -> TextTokenizer:
    """Make a byte-level BPE tokenizer; the same texts give the same file.

    Args:
        texts: what to learn from.
        folder: gets `tokenizer.json`; made if missing. A tokenizer in it is replaced.
        vocab_size: most text tokens, with 256 bytes and 3 special ones; there are fewer if the texts have no
            more pairs that repeat.

    Raises:
        ValueError: if `vocab_size` is less than 259.
    """
    fewest = _NUM_BYTES + len(_SPECIAL)
    if vocab_size < fewest:
        raise ValueError(
            f"vocab_size is {vocab_size}; {_NUM_BYTES} bytes and {len(_SPECIAL)} special tokens need {fewest}"
        )
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / FILE, tokenizer.to_str(pretty=True))
    return TextTokenizer(folder)
