"""A store of conversations gives back turns and images, and knows every length without reading them."""

import json
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from broken_stores import forget_files

from illume_lightning.data.chat import EDIT, render
from illume_lightning.data.conversation import IMAGE, RESOLUTION_TAG, Conversation, Turn
from illume_lightning.data.conversation_store import (
    ConversationStore,
    make_sample,
    pack_images,
    unpack_images,
)
from illume_lightning.data.part import Lost, Sample
from illume_lightning.data.store import ImageStore
from illume_lightning.data.text_tokenizer import TextTokenizer, train_tokenizer
from illume_lightning.data.writer import write_stores


def talk(*texts: str) -> Conversation:
    return Conversation(tuple(Turn(("user", "assistant")[n % 2], text) for n, text in enumerate(texts)))


EXAMPLES = [
    (talk("How {many}?", 'Two "\u00e9" \U0001f600.'), []),
    (talk(f"{IMAGE}\nWhat is it?", "a cat", f"And {IMAGE}?", "a dog"), [(32, 48), (64, 16)]),
    (talk(f"Draw {RESOLUTION_TAG} a cat, really {RESOLUTION_TAG}", IMAGE), [(40, 50)]),
    (talk(EDIT, f"Here: {IMAGE} and {IMAGE}.", "Thanks.", "Welcome."), [(16, 16), (17, 18), (19, 20)]),
]

KNOWN = '{"world":"caf\u00e9","kinds":["count","caption"],"number":3}'


@dataclass(frozen=True)
class ExamplesPart:
    tokenizer: TextTokenizer
    start: int
    num_items: int

    def read(self) -> Iterator[Sample | Lost]:
        for number in range(self.start, self.start + self.num_items):
            conversation, sizes = EXAMPLES[number % len(EXAMPLES)]
            images = [bytes([number]) * (10 + height) for height, _ in sizes]
            known = "{}" if number % 2 else KNOWN
            yield make_sample(f"file:{number}", conversation, images, sizes, self.tokenizer, meta=known)


@dataclass(frozen=True)
class PicturesPart:
    num_items: int = 1

    def read(self) -> Iterator[Sample | Lost]:
        yield Sample("a", b"pixels", "caption", "{}", 3, 4)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return train_tokenizer(["a cat and a dog and a cat"], tmp_path_factory.mktemp("tokenizer"), 300)


def write(path: Path, tokenizer: TextTokenizer, **options: bool) -> None:
    identity = {"kind": "conversations", "text_tokenizer": tokenizer.fingerprint}
    write_stores(path, identity, lambda: [ExamplesPart(tokenizer, n, 5) for n in (0, 5)], **options)


@pytest.fixture(scope="module")
def written(tokenizer: TextTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "talks"
    write(path, tokenizer)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "pictures"
    write_stores(path, {"kind": "images"}, lambda: [PicturesPart()])
    return path


def test_records_come_back(written: Path) -> None:
    store = pickle.loads(pickle.dumps(ConversationStore(written)))
    assert len(store) == 10
    for index in (9, 0, 5, 3):
        conversation, sizes = EXAMPLES[index % len(EXAMPLES)]
        record = store.read(index)
        assert record.conversation == conversation
        assert record.images == tuple(bytes([index]) * (10 + height) for height, _ in sizes)
        assert record.source == f"file:{index}"
        assert record.meta == ("{}" if index % 2 else KNOWN)
    with pytest.raises(IndexError, match="record 10"):
        store.read(10)
    store.verify()


def test_numbers_are_those_of_the_chat_format(written: Path, tokenizer: TextTokenizer) -> None:
    store = ConversationStore(written)
    assert store.text_tokenizer == tokenizer.fingerprint
    assert store.images.shape == (int(store.first_image[-1]), 4)
    for index in range(len(store)):
        conversation, sizes = EXAMPLES[index % len(EXAMPLES)]
        pieces = render(conversation, tokenizer)
        assert store.num_text[index] == sum(len(piece.ids) for piece in pieces)
        assert store.num_supervised[index] == sum(len(p.ids) for p in pieces if p.is_supervised)
        rows = store.images_of(index).tolist()
        assert [tuple(row[1:3]) for row in rows] == sizes
        assert [bool(row[0]) for row in rows] == list(conversation.is_target)
        assert sum(row[3] for row in rows) == sum(piece.kind == "size" for piece in pieces)
        assert store.sizes[index].tolist() == list(sizes[0] if sizes else (0, 0))
    assert store.images_of(1).tolist() == [[0, 32, 48, 0], [0, 64, 16, 0]]
    assert store.images_of(2).tolist() == [[1, 40, 50, 3]]  # twice in the request, once before the image
    assert store.images_of(3).tolist() == [[0, 16, 16, 1], [1, 17, 18, 1], [1, 19, 20, 1]]


def test_summary_of_sizes_leaves_out_conversations_without_images(written: Path) -> None:
    sizes = ConversationStore(written).manifest.sizes
    assert sizes["height"] == {"min": 16, "median": 32, "max": 40}
    assert sizes["distinct"] == 3


@pytest.mark.parametrize("images", [[], [b""], [b"a", b"", b"bcd"]])
def test_packed_images(images: list[bytes]) -> None:
    data = pack_images(images)
    assert unpack_images(data) == tuple(images)
    assert len(data) == 4 + 4 * len(images) + sum(map(len, images))
    for damaged in (data + b"x", data[:-1], b"\xff" + data[1:]):
        with pytest.raises(ValueError, match="bytes are not .* packed images"):
            unpack_images(damaged)
    assert pack_images([b"ab"]) == b"\1\0\0\0\2\0\0\0ab"


def test_kinds_of_stores_are_told_apart(written: Path, pictures: Path) -> None:
    with pytest.raises(ValueError, match="holds conversations where pictures are expected.*prepare images"):
        ImageStore(written)
    with pytest.raises(ValueError, match="holds images where conversations are.*prepare conversations"):
        ConversationStore(pictures)
    with pytest.raises(FileNotFoundError, match="there is no store"):
        ConversationStore(pictures / "nowhere")
    assert {path.suffix for path in pictures.iterdir()} == {".bin", ".json", ".npy"}


def test_broken_rows_are_noticed(written: Path, tmp_path: Path) -> None:
    copied, older = (Path(shutil.copytree(written, tmp_path / name)) for name in ("talks", "older"))
    with np.load(copied / "rows.npz") as content:
        values, ends = content["values"], content["ends"]
    assert values.dtype == np.int32
    assert ends.dtype == np.int64
    forget_files(older)
    for broken in (
        {"values": values[:-1], "ends": ends},
        {"values": values, "ends": ends[1:]},
        {"values": values, "ends": np.r_[ends[0] + 1, ends[1:]]},
        {"values": values, "ends": np.r_[0, ends[1:]]},
    ):
        np.savez(copied / "rows.npz", **broken)
        with pytest.raises(ValueError, match=r"rows.npz is not the file that manifest.json is of"):
            ConversationStore(copied)
        shutil.copy(copied / "rows.npz", older)
        with pytest.raises(ValueError, match=r"rows.npz and the manifest, which counts 10 .* contradict"):
            ConversationStore(older)
    (older / "rows.npz").write_bytes(b"PK\3\4 no archive")
    with pytest.raises(ValueError, match="rows.npz is damaged"):
        ConversationStore(older)
    (copied / "rows.npz").unlink()
    with pytest.raises(FileNotFoundError, match="rows.npz is missing"):
        ConversationStore(copied)


def test_rows_are_part_of_what_is_replaced(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    write(tmp_path / "talks", tokenizer)
    write_stores(tmp_path / "talks", {"kind": "images"}, lambda: [PicturesPart()], overwrite=True)
    assert not (tmp_path / "talks" / "rows.npz").exists()
    write(tmp_path / "talks", tokenizer, overwrite=True)
    assert len(ConversationStore(tmp_path / "talks")) == 10
    assert json.loads((tmp_path / "talks" / "manifest.json").read_text())["version"] == 1
