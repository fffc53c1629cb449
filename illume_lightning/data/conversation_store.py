"""Conversations in a store: how images and turns are packed, and what is known without reading them.

The store is one as any other (see `store`). A record holds all images of a conversation in one piece, and its
turns as JSON. `rows.npz` has the numbers from which the length of every conversation in tokens follows.
"""

import json
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from illume_lightning.data.chat import render
from illume_lightning.data.conversation import Conversation, Turn
from illume_lightning.data.part import Sample
from illume_lightning.data.remote import Remote
from illume_lightning.data.store import CONVERSATIONS, ROWS, Store
from illume_lightning.data.text_tokenizer import TextTokenizer
from illume_lightning.resolution import Size

_NUM_COUNTS = 2  # of a conversation, ahead of its images' numbers
_NUM_IMAGE_VALUES = 4


class ConversationRecord(NamedTuple):
    """One conversation, its images as encoded bytes in order of appearance, and where it came from."""

    conversation: Conversation
    images: tuple[bytes, ...]
    source: str
    meta: str
    """What else is known of it, as a JSON object on one line; "{}" if nothing is."""


class ConversationStore(Store):
    """The conversations of a store, by index.

    Opening reads no record. The store can be handed to `DataLoader` workers.

    Args:
        path: See `Store`.
        remote: See `Store`.

    Raises:
        FileNotFoundError: See `Store`, as for other errors of the file system.
        ValueError: If files of the folder contradict one another, or it holds something else.
    """

    def __init__(self, path: str | Path, remote: Remote = Remote()) -> None:
        super().__init__(path, remote)
        kind = self.manifest.identity.get("kind")
        if kind != CONVERSATIONS:
            raise ValueError(
                f"{path} holds {kind} where conversations are expected; `illume prepare conversations` makes "
                "such stores"
            )
        self.text_tokenizer: str = self.manifest.identity["text_tokenizer"]
        """Fingerprint of the text tokenizer that the counts of tokens are of."""
        values, starts, num_images = _read_rows(self.path / ROWS, len(self))
        self.num_text: np.ndarray = values[starts]
        """Tokens of each conversation without images and sizes, int32 (N,)."""
        self.num_supervised: np.ndarray = values[starts + 1]
        """Those of them that are learned, int32 (N,)."""
        self.first_image: np.ndarray = np.concatenate([[0], np.cumsum(num_images)])
        """Where each conversation's images begin in `images`, int64 (N + 1,)."""
        counts = np.concatenate([starts, starts + 1])
        self.images: np.ndarray = np.delete(values, counts).reshape(-1, _NUM_IMAGE_VALUES)
        """Of each image whether it is generated (1 or 0), height, width, and how often its size is named,
        int32 (M, 4)."""

    def images_of(self, index: int) -> np.ndarray:
        """The rows of `images` of one conversation, (n, 4)."""
        return self.images[self.first_image[index] : self.first_image[index + 1]]

    def read(self, index: int) -> ConversationRecord:
        """Read one conversation.

        Args:
            index: 0 to `len(self) - 1`.

        Raises:
            IndexError: If the index is out of range.
            DamagedRecord: If the record is not what was written.
        """
        record = self._record(index)
        try:
            content = json.loads(record.meta)
            conversation = Conversation(tuple(Turn(**turn) for turn in content["turns"]))
            known = json.dumps(content.get("meta", {}), ensure_ascii=False, separators=(",", ":"))
            return ConversationRecord(conversation, unpack_images(record.image), content["source"], known)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise self.damaged(index, f"no conversation: {error}") from error


def make_sample(
    name: str,
    conversation: Conversation,
    images: Sequence[bytes],
    sizes: Sequence[Size],
    tokenizer: TextTokenizer,
    converted: tuple[str, ...] = (),
    split: str = "",
    meta: str = "{}",
) -> Sample:
    """A conversation as a record to write.

    Args:
        name: Where it came from, for messages and for `ConversationRecord.source`.
        conversation: Turns, with as many images as are given.
        images: Canonical bytes in order of appearance.
        sizes: Their heights and widths in pixels.
        tokenizer: Counts the tokens of text.
        converted: What was changed in the images.
        split: The store it goes to.
        meta: What else is known of it, a JSON object, for `ConversationRecord.meta`.

    Raises:
        ValueError: If no image to generate follows a resolution tag.
    """
    pieces = render(conversation, tokenizer)
    texts = [piece for piece in pieces if piece.kind == "text"]
    mentions = Counter(piece.image for piece in pieces if piece.kind == "size")
    row = [
        sum(len(piece.ids) for piece in texts),
        sum(len(piece.ids) for piece in texts if piece.is_supervised),
    ]
    for number, (is_target, size) in enumerate(zip(conversation.is_target, sizes, strict=True)):
        row += [int(is_target), *size, mentions[number]]
    source = json.dumps(name, ensure_ascii=False)
    known = "" if meta == "{}" else f',"meta":{meta}'
    content = f'{{"source":{source},"turns":{conversation.to_json()}{known}}}'
    first = sizes[0] if sizes else (0, 0)
    return Sample(name, pack_images(images), "", content, *first, converted, split, tuple(row))


def pack_images(images: Sequence[bytes]) -> bytes:
    """Several images in one piece: their number and lengths in bytes (little-endian uint32), then the bytes."""
    return np.array([len(images), *map(len, images)], "<u4").tobytes() + b"".join(images)


def unpack_images(data: bytes) -> tuple[bytes, ...]:
    """The images that `pack_images` packed.

    Raises:
        ValueError: If the lengths do not add up to the data.
    """
    count = int.from_bytes(data[:4], "little")
    position = 4 + 4 * count
    lengths = [int.from_bytes(data[at : at + 4], "little") for at in range(4, min(position, len(data)), 4)]
    if len(data) != position + sum(lengths):
        raise ValueError(f"{len(data)} bytes are not {count} packed images")
    images = []
    for length in lengths:
        images.append(data[position : position + length])
        position += length
    return tuple(images)


def _read_rows(path: Path, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The values of `rows.npz`, where each conversation's begin (N,), and its number of images (N,)."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; copy the store again or prepare it again")
    try:
        with np.load(path) as content:
            values, ends = content["values"], content["ends"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged; copy the store again or prepare it again") from error
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    num_images, rest = np.divmod(ends - starts - _NUM_COUNTS, _NUM_IMAGE_VALUES)
    if ends.shape != (count,) or ends[-1] != len(values) or rest.any() or (num_images < 0).any():
        raise ValueError(
            f"{path} and the manifest, which counts {count} conversations, contradict each other; copy the "
            "store again or prepare it again"
        )
    return values, starts, num_images
