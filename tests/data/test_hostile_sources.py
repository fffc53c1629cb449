"""Folders, archives and annotation files that reach for what is not theirs, or hold what cannot be stored."""

import io
import json
import os
import tarfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from illume_lightning.data.conversation_source import AnnotationReader, Unusable, loads
from illume_lightning.data.conversation_store import ConversationStore
from illume_lightning.data.image import Limits, encode_png
from illume_lightning.data.part import Lost, Sample
from illume_lightning.data.prepare import prepare_images
from illume_lightning.data.prepare_conversations import prepare_conversations
from illume_lightning.data.safe_file import MAX_BYTES
from illume_lightning.data.source import Rules
from illume_lightning.data.store import ImageStore
from illume_lightning.data.text_tokenizer import TextTokenizer, train_tokenizer


def png(number: int) -> bytes:
    return encode_png(np.random.default_rng(number).integers(0, 256, (20, 24, 3), np.uint8))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["a cat and a dog"], folder, 270)
    return str(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one good picture, beside a secret one with a secret text."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "good.png").write_bytes(png(0))
    (tmp_path / "secret.png").write_bytes(png(1))
    (tmp_path / "secret.txt").write_text("secret")
    return tmp_path / "pictures"


def dropped(manifest) -> dict[str, list[str]]:
    return {
        reason: [name.rpartition("/")[2] for name in loss.examples]
        for reason, loss in manifest.dropped.items()
    }


# -- folders --


def test_a_folder_that_reaches_out(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(folder / "pipe.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "circle.png").symlink_to("circle.png")
    (folder / "nothing.png").symlink_to("nowhere.png")
    (folder / "out.png").symlink_to("../secret.png")
    (folder / "absolute.png").symlink_to(tmp_path / "secret.png")
    (folder / "inside.png").symlink_to("good.png")
    (folder / "whole").symlink_to(tmp_path)  # folders that are links are not entered
    (folder / "words.png").write_bytes(png(2))
    (folder / "words.txt").symlink_to("../secret.txt")
    os.link(tmp_path / "secret.png", folder / "hard.png")  # nothing tells it from a file
    with (folder / "endless.png").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    manifest = prepare_images([str(folder)], tmp_path / "out")[""]
    assert dropped(manifest) == {
        "file too large": ["endless.png"],
        "link out of the folder": ["absolute.png", "out.png", "words.png", "zero.png"],
        "not a file": ["circle.png", "nothing.png", "pipe.png"],
    }
    store = ImageStore(tmp_path / "out")
    assert [store.read(n).image for n in range(len(store))] == [png(0), png(1), png(0)]


def test_links_are_followed_where_asked(folder: Path, tmp_path: Path) -> None:
    (folder / "out.png").symlink_to("../secret.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    prepare_images([str(folder)], tmp_path / "out")
    manifest = prepare_images([str(folder)], tmp_path / "out", follow_links=True, overwrite=True)[""]
    assert (manifest.written, dropped(manifest)) == (2, {"not a file": ["zero.png"]})


def test_names_of_any_kind(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    names = [b"new\nline.png", "caf\u00e9.png".encode(), "cafe\u0301.png".encode(), b"\xff\xfe.png",
             "\u202egnp.exe.png".encode(), b"tab\t'\"$(id).png", "\U0001f468\u200d\U0001f469.png".encode()]  # fmt: skip
    for number, name in enumerate(names):
        Path(os.fsdecode(os.path.join(os.fsencode(folder), name))).write_bytes(png(number))
    assert prepare_images([str(folder)], tmp_path / "out")[""].written == len(names)  # NFC and NFD are two


@pytest.mark.parametrize(
    "caption",
    ["caf\u00e9", "cafe\u0301", "\u05e9\u05dc \u202e.", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "a\r\nb",
     "a\0b", "\u2028", "\ufffe", "x" * 1_000_000, "</s><image>{resolution_tag}"],
    ids=["NFC", "NFD", "RTL", "ZWJ", "CRLF", "NUL", "separator", "noncharacter", "1 MB", "markup"],
)  # fmt: skip
def test_captions_come_back_unchanged(caption: str, folder: Path, tmp_path: Path) -> None:
    (folder / "good.txt").write_bytes(caption.encode())
    prepare_images([str(folder)], tmp_path / "out")
    assert ImageStore(tmp_path / "out").read(0).caption == caption.strip()


def test_captions_that_are_no_text_are_dropped(folder: Path, tmp_path: Path) -> None:
    for name, caption in {
        "latin": b"caf\xe9",
        "utf16": "a cat".encode("utf-16"),
        "half": b"\xf0\x9f\x98",
    }.items():
        (folder / f"{name}.png").write_bytes(png(3))
        (folder / f"{name}.txt").write_bytes(caption)
    (folder / "marked.png").write_bytes(png(4))
    (folder / "marked.txt").write_bytes(b"\xef\xbb\xbfmarked")
    manifest = prepare_images([str(folder)], tmp_path / "out")[""]
    assert dropped(manifest) == {"text is not Unicode": ["half.png", "latin.png", "utf16.png"]}
    assert ImageStore(tmp_path / "out").read(1).caption == "marked"


# -- archives --


def member(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", link: str = "") -> tuple:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, len(data), link
    return info, io.BytesIO(data)


def test_an_archive_that_reaches_out(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(1))
    members = [
        member("../../outside.png", data=png(0)),
        member("/absolute.png", data=png(2)),
        member("soft.png", tarfile.SYMTYPE, link=str(secret)),
        member("hard.png", tarfile.LNKTYPE, link="/absolute.png"),
        member("pipe.png", tarfile.FIFOTYPE),
        member("device.png", tarfile.CHRTYPE),
        member("words.png", data=png(3)),
        member("words.txt", tarfile.SYMTYPE, link="/etc/passwd"),
        member("new\nline.png", data=png(4)),
        member("latin.png", data=png(5)),
        member("latin.txt", data=b"caf\xe9"),
        member("lone.png", data=png(6)),
        member("lone.json", data=b'{"caption": "\\ud800"}'),
        member("deep.png", data=png(7)),
        member("deep.json", data=b"[" * 100_000),
        member("digits.png", data=png(8)),
        member("digits.json", data=b'{"n": ' + b"9" * 5000 + b"}"),
    ]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for info, data in members:
            archive.addfile(info, data)
    manifest = prepare_images([str(tmp_path / "a.tar")], tmp_path / "out", part_items=2)[""]
    assert dropped(manifest) == {
        "json not readable": ["deep", "digits"],
        "not a file": ["soft", "hard", "pipe", "device", "words"],
        "text is not Unicode": ["latin", "lone"],
    }
    store = ImageStore(tmp_path / "out")
    assert [store.read(n).image for n in range(len(store))] == [png(0), png(2), png(4)]
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "out", "secret.png"]


def test_an_archive_with_a_file_that_would_fill_memory(tmp_path: Path) -> None:
    """One of 2^40 bytes that are holes: GNU tar's sparse files, 512 bytes in the archive."""
    info = tarfile.TarInfo("bomb.png")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[483:495] = b"\x80" + (2**40).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    with tarfile.open(tmp_path / "good.tar", "w") as archive:
        archive.addfile(*member("good.png", data=png(0)))
    good = (tmp_path / "good.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(bytes(header) + good)
    manifest = prepare_images([str(tmp_path / "a.tar")], tmp_path / "out")[""]
    assert (manifest.written, dropped(manifest)) == (1, {"file too large": ["bomb"]})


# -- annotation files --


def line(image: object, text: str = "<image>") -> str:
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "x"}]
    return json.dumps({"conversations": turns, "image": image})


def test_annotations_that_reach_out(folder: Path, tmp_path: Path, tokenizer: str) -> None:
    os.mkfifo(folder / "pipe.png")
    (folder / "out.png").symlink_to("../secret.png")
    (folder / "inside.png").symlink_to("good.png")
    (folder / "elsewhere").symlink_to(tmp_path)
    outside = ["../secret.png", "x/../../secret.png", str(tmp_path / "secret.png"), "/etc/passwd", "/dev/zero",
               "/proc/self/environ", "../pictures-2/a.png"]  # fmt: skip
    links = ["out.png", "elsewhere/secret.png"]
    missing = [
        "pipe.png",
        "~/secret.png",
        "good.png\0.jpg",
        "x/../good.png",
        "file:/etc/passwd",
        "\ud800.png",
        ".",
    ]
    addresses = ["file:///etc/passwd", "http://localhost/a.png", "data:image/png;base64,AAAA"]
    fine = ["good.png", "./good.png", "inside.png", str(folder / "good.png")]
    (folder / "a.jsonl").write_text("\n".join(map(line, fine + outside + links + missing + addresses)))
    options = {"tokenizer": tokenizer}
    manifest = prepare_conversations([str(folder / "a.jsonl")], tmp_path / "out", **options)[""]
    counts = {reason: loss.count for reason, loss in manifest.dropped.items()}
    assert counts == {
        "image outside of the folder": len(outside),
        "image link out of the folder": len(links),
        "missing image file": len(missing),
        "image is an address, not a file": len(addresses),
    }
    assert manifest.dropped["image outside of the folder"].examples[0] == f"a.jsonl:{len(fine) + 1}"
    assert manifest.written == len(fine)
    wider = prepare_conversations(
        [str(folder / "a.jsonl")], tmp_path / "wide", **options, image_root=str(tmp_path), follow_links=True
    )[""]
    assert wider.dropped.get("image link out of the folder") is None
    store = ConversationStore(tmp_path / "wide")
    assert png(1) in [store.read(index).images[0] for index in range(len(store))]


@pytest.mark.parametrize(
    "text",
    ["caf\u00e9", "cafe\u0301", "\u05e9\u202e", "\U0001f468\u200d\U0001f469", "a\r\nb", "a\0b", "\u2028\ufeff",
     "x" * 1_000_000],
    ids=["NFC", "NFD", "RTL", "ZWJ", "CRLF", "NUL", "separators", "1 MB"],
)  # fmt: skip
def test_turns_come_back_unchanged(text: str, tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "a.jsonl").write_text(line([], text) + "\n")
    prepare_conversations([str(tmp_path / "a.jsonl")], tmp_path / "out", tokenizer=tokenizer)
    store = ConversationStore(tmp_path / "out")
    assert store.read(0).conversation.turns[0].text == text
    assert store.num_text[0] > len(text) / 8


def test_lines_that_are_no_text_are_dropped(tmp_path: Path, tokenizer: str) -> None:
    good = line([], "fine").encode()
    lines = [
        good,
        line([], "lone \ud800").encode(),
        good.replace(b"fine", b"\xff\xfe"),
        good[:-5],
        good.replace(b"fine", b"a\0b"),
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    manifest = prepare_conversations([str(tmp_path / "a.jsonl")], tmp_path / "out", tokenizer=tokenizer)[""]
    assert dropped(manifest) == {
        "text is not Unicode": ["a.jsonl:2"],
        "unreadable JSON": ["a.jsonl:3", "a.jsonl:4", "a.jsonl:5"],  # the last has a bare zero byte
    }
    assert manifest.written == 1


def test_the_report_has_a_line_for_each_record(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "new\nline.jsonl").write_text("{}\n17\n" + line([], "fine"))
    prepare_conversations(
        [str(tmp_path / "new\nline.jsonl")],
        tmp_path / "out",
        tokenizer=tokenizer,
        report=str(tmp_path / "report"),
    )
    assert (tmp_path / "report").read_text().splitlines() == [
        "new\\nline.jsonl:1\tno turns",
        "new\\nline.jsonl:2\tnot a JSON object",
    ]


# -- fuzz --

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["user", "assistant", "gpt", "human", "<image>", "a.png", "../a.png", "text", "image"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["conversations", "messages", "image", "images", "from", "role", "value", "content", "type",
                         "text", "bytes", "path", "url", "image_url"]) | st.text(max_size=3),
        inner, max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@pytest.fixture(scope="module")
def reader(tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> AnnotationReader:
    folder = tmp_path_factory.mktemp("annotations")
    (folder / "a.png").write_bytes(png(0))
    return AnnotationReader(Rules(Limits(), 0.0), TextTokenizer(tokenizer), folder)


def holds_for(reader: AnnotationReader, record: object) -> None:
    result = reader.sample("place", record)
    assert isinstance(result, Sample | Lost)
    if isinstance(result, Sample):
        result.meta.encode()


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(record=JSON, junk=st.binary(max_size=30))
def test_any_record(reader: AnnotationReader, record: object, junk: bytes) -> None:
    holds_for(reader, record)
    holds_for(reader, junk)
    holds_for(reader, json.dumps(record).encode() + junk)


@pytest.mark.slow
@settings(max_examples=20_000, derandomize=True, deadline=None, database=None)
@given(record=JSON, junk=st.binary(max_size=30))
def test_many_records(reader: AnnotationReader, record: object, junk: bytes) -> None:
    holds_for(reader, record)
    with suppress(Unusable):
        loads(junk)
