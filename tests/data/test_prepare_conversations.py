"""Annotation files of all schemas become conversations; what breaks a rule is named and left out."""

import errno
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

import cli
from illume_lightning.data.conversation import Conversation, Turn
from illume_lightning.data.conversation_store import ConversationStore
from illume_lightning.data.image import encode_png
from illume_lightning.data.prepare_conversations import prepare_conversations
from illume_lightning.data.store import ImageStore, Manifest
from illume_lightning.data.text_tokenizer import train_tokenizer


def png(number: int) -> bytes:
    random = np.random.default_rng(number)
    return encode_png(random.integers(0, 256, (20 + number, 24, 3), np.uint8))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["a cat and a dog"], folder, 270)
    return str(folder)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with pictures 0.png to 5.png in `pictures`, for annotation files."""
    (tmp_path / "pictures").mkdir()
    for number in range(6):
        (tmp_path / "pictures" / f"{number}.png").write_bytes(png(number))
    return tmp_path


def llava(*texts: str, **fields: Any) -> dict[str, Any]:
    """A record of a conversation that the human begins."""
    turns = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]
    return {"conversations": turns, **fields}


def write_lines(path: Path, records: list[Any]) -> str:
    """JSON Lines; strings are written as they are."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def texts(conversation: Conversation) -> list[str]:
    return [turn.text for turn in conversation.turns]


def content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


GOOD = [
    llava("<image>\nWhat is {it}?", "a cat", image="pictures/0.png", id=7),
    llava("<image> or\n<image>?", "The first.", "And <image>?", "No.", image=[f"pictures/{n}.png" for n in (1, 2, 3)]),
    llava("Hello, \u201c[}\u201d \\ \" ,", "Bye \U0001f600"),
    llava("{resolution_tag}Draw.", "Here: <image>", "More!", "<image>", images=["pictures/4.png", "pictures/5.png"]),
    {"messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Edit it."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Sure."}, {"type": "image"}]},
    ], "images": ["pictures/0.png", "pictures/1.png"]},
    {"messages": [
        {"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "pictures/2.png"}}, "and",
            {"type": "image", "image": "pictures/3.png"}, {"type": "text", "text": "?"},
        ]},
        {"role": "assistant", "content": "Yes."},
    ]},
]  # fmt: skip
IMAGES = [[0], [1, 2, 3], [], [4, 5], [0, 1], [2, 3]]


@pytest.mark.parametrize("name", ["talks.jsonl", "talks.json", "pretty.json", "bom.json"])
@pytest.mark.parametrize("part_items", [1, 4, 100])
def test_schemas_of_conversations(name: str, part_items: int, root: Path, tokenizer: str) -> None:
    text = json.dumps(GOOD, indent=4 if name == "pretty.json" else None, ensure_ascii=name == "bom.json")
    if name == "talks.jsonl":
        write_lines(root / name, GOOD)
    else:
        (root / name).write_text(text, encoding="utf-8-sig" if name == "bom.json" else "utf-8")
    manifest = prepare_conversations(
        [str(root / name)], root / "out", tokenizer=tokenizer, part_items=part_items
    )[""]
    assert (manifest.written, manifest.dropped) == (6, {})
    store = ConversationStore(root / "out")
    store.verify()
    records = [store.read(index) for index in range(len(store))]
    mark = ":{}" if name == "talks.jsonl" else "#{}"
    first = 1 if name == "talks.jsonl" else 0
    for number, record in enumerate(records):
        assert record.images == tuple(png(n) for n in IMAGES[number])
        assert record.source == name + mark.format(number + first)
    assert records[0].conversation.turns == (
        Turn("user", "<image>\nWhat is {it}?"),
        Turn("assistant", "a cat"),
    )
    assert texts(records[2].conversation) == ['Hello, \u201c[}\u201d \\ " ,', "Bye \U0001f600"]
    assert [record.conversation.task for record in records] == [
        "understanding", "understanding", "text", "generation", "editing", "understanding",
    ]  # fmt: skip
    assert [turn.role for turn in records[4].conversation.turns] == ["system", "user", "assistant"]
    assert texts(records[4].conversation)[1:] == ["<image>\nEdit it.", "Sure.\n<image>"]
    assert texts(records[5].conversation)[0] == "<image>\nand\n<image>\n?"
    assert store.images_of(3).tolist() == [[1, 24, 24, 2], [1, 25, 24, 1]]


NESTED = "[" * 100_000
BAD = [
    ("unreadable JSON", '{"conversations": ['),
    ("unreadable JSON", NESTED),
    ("unreadable JSON", '{"image": %s}' % ("9" * 5000)),
    ("not a JSON object", "17"),
    ("no turns", {"conversations": []}),
    ("no turns", {"id": 3, "text": "hello"}),
    ("no turns", {"messages": "hello"}),
    ("a turn is not an object", {"messages": ["hello"]}),
    ("unknown role", {"conversations": [{"from": "tool", "value": "x"}]}),
    ("unknown role", {"conversations": [{"from": ["human"], "value": "x"}]}),
    ("a turn without text", {"messages": [{"role": "user", "content": None}]}),
    ("content that is neither text nor image", {"messages": [{"role": "user", "content": [{"type": "audio"}]}]}),
    ("text is not Unicode", llava("lone \ud800", "x")),
    ("a system turn is not the first", {"messages": [
        {"role": "user", "content": "a"}, {"role": "system", "content": "b"}, {"role": "assistant", "content": "c"},
    ]}),
    ("no assistant turn", llava("anyone?")),
    ("no assistant turn", {"messages": [{"role": "system", "content": "a"}]}),
    ("starts with the assistant", {"conversations": [{"from": "gpt", "value": "Hi"}]}),
    ("two turns of one side in a row", {"conversations": [
        {"from": "human", "value": "a"}, {"from": "human", "value": "b"}, {"from": "gpt", "value": "c"},
    ]}),
    ("empty assistant turn", llava("Hi", " \n")),
    ("wrong number of images (2 <image>, 1 images)", llava("<image><image>", "x", image="pictures/0.png")),
    ("wrong number of images (0 <image>, 2 images)", llava("?", "x", image=["pictures/0.png", "pictures/1.png"])),
    ("wrong number of images (1 <image>, 0 images)", llava("<image>", "x", image="")),
    ("an image, but no <image> in any turn", llava("What?", "x", image="pictures/0.png")),
    ("<image> in the system turn", {"messages": [
        {"role": "system", "content": "<image>"}, {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ], "image": "pictures/0.png"}),
    ("{resolution_tag} without an image to generate after it", llava("{resolution_tag}?", "x")),
    ("{resolution_tag} in an assistant turn", llava("Draw", "{resolution_tag}<image>", image="pictures/0.png")),
    ("images both in the turns and beside them", {"messages": [
        {"role": "user", "content": [{"type": "image", "image": "pictures/1.png"}, {"type": "image"}]},
        {"role": "assistant", "content": "b"},
    ], "images": ["pictures/0.png"]}),
    ("missing image file", llava("<image>", "x", image="pictures/none.png")),
    ("missing image file", llava("<image>", "x", image="pictures")),
    ("missing image file", llava("<image>", "x", image="nul\0.png")),
    ("missing image file", llava("<image>", "x", image="n" * 5000)),
    ("image outside of the folder", llava("<image>", "x", image="/dev/zero")),
    ("image outside of the folder", llava("<image>", "x", image="pictures/../../secret.png")),
    ("image is neither a file name nor bytes", llava("<image>", "x", image=[None])),
    ("image is neither a file name nor bytes", llava("<image>", "x", image=17)),
    ("image is an address, not a file", llava("<image>", "x", image="https://example.org/a.png")),
    ("unusable image: damaged", llava("<image>", "x", image="pictures/cut.png")),
    ("unusable image: unreadable", llava("<image>", "x", image="talks.jsonl")),
    ("unusable image: side below 16 px", llava("<image>", "x", image="pictures/small.png")),
]  # fmt: skip


@pytest.fixture
def nasty(root: Path) -> str:
    """Every bad record, with a good one and an empty line before each."""
    (root / "pictures" / "cut.png").write_bytes(png(0)[:700])
    (root / "pictures" / "small.png").write_bytes(encode_png(np.zeros((8, 30, 3), np.uint8)))
    return write_lines(root / "talks.jsonl", [line for _, bad in BAD for line in (GOOD[0], "  ", bad)])


@pytest.mark.parametrize("part_items", [7, 1000])
def test_bad_records_are_named(part_items: int, nasty: str, root: Path, tokenizer: str) -> None:
    manifest = prepare_conversations([nasty], root / "out", tokenizer=tokenizer, part_items=part_items)[""]
    expected: dict[str, list[str]] = {}
    for number, (reason, _) in enumerate(BAD):
        expected.setdefault(reason, []).append(f"talks.jsonl:{3 * number + 3}")
    found = {reason: list(loss.examples) for reason, loss in manifest.dropped.items()}
    assert found == expected
    assert {reason: loss.count for reason, loss in manifest.dropped.items()} == {
        reason: len(places) for reason, places in expected.items()
    }
    assert manifest.written == len(BAD)
    store = ConversationStore(root / "out")
    assert [store.read(n).source for n in range(3)] == ["talks.jsonl:1", "talks.jsonl:4", "talks.jsonl:7"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_report_instead_of_a_store(
    num_workers: int, nasty: str, root: Path, tokenizer: str, caplog: pytest.LogCaptureFixture
) -> None:
    report = root / "bad.txt"
    with caplog.at_level("INFO"):
        made = prepare_conversations(
            [nasty],
            root / "out",
            tokenizer=tokenizer,
            report=str(report),
            part_items=20,
            num_workers=num_workers,
        )
    assert made == {}
    assert not list(root.glob("out*"))
    lines = [f"talks.jsonl:{3 * number + 3}\t{reason}" for number, (reason, _) in enumerate(BAD)]
    assert report.read_text().splitlines() == lines
    assert f"{len(BAD)} of {2 * len(BAD)} records cannot be used" in caplog.text


def test_image_root_and_converted_images(root: Path, tokenizer: str) -> None:
    Image.fromarray(np.zeros((60, 30), np.uint8)).save(root / "pictures" / "gray.png")
    (root / "notes").mkdir()
    source = write_lines(root / "notes" / "a.jsonl", [llava("<image>", "gray", image="gray.png")])
    with pytest.raises(ValueError, match=r"no usable conversation \(dropped: 1 missing image file\)"):
        prepare_conversations([source], root / "out", tokenizer=tokenizer)
    options: dict[str, Any] = {"tokenizer": tokenizer, "image_root": str(root / "pictures"), "max_side": 40}
    manifest = prepare_conversations([source], root / "out", **options)[""]
    assert manifest.converted == {"downscaled": 1, "gray": 1}
    store = ConversationStore(root / "out")
    assert store.images.tolist() == [[0, 40, 20, 0]]
    assert Image.open(io.BytesIO(store.read(0).images[0])).mode == "RGB"


CAPTIONS = {"0": "a {cat} {0}", "1": "draw <image>", "2": "{resolution_tag}", "3": " a dog. \n", "4": ""}


@pytest.fixture(params=["folder", "tar", "parquet"])
def captioned(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Five captioned pictures, as a user may have them."""
    if request.param == "parquet":
        columns = {"image": [png(int(n)) for n in CAPTIONS], "caption": list(CAPTIONS.values())}
        parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
        return str(tmp_path / "a.parquet")
    folder = tmp_path / "captioned"
    folder.mkdir()
    for name, caption in CAPTIONS.items():
        (folder / f"{name}.png").write_bytes(png(int(name)))
        (folder / f"{name}.txt").write_text(caption)
    if request.param == "folder":
        return str(folder)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.add(path, path.name)
    return str(tmp_path / "a.tar")


def test_captions(captioned: str, tmp_path: Path, tokenizer: str) -> None:
    asked, drawn = (
        prepare_conversations([captioned], tmp_path / task, tokenizer=tokenizer, captions=task)[""]
        for task in ("understand", "generate")
    )
    for manifest in (asked, drawn):
        assert {reason: loss.count for reason, loss in manifest.dropped.items()} == {
            "<image> or {resolution_tag} in the caption": 2, "no caption": 1,
        }  # fmt: skip
    store = ConversationStore(tmp_path / "understand")
    assert texts(store.read(0).conversation) == ["<image>\nDescribe the image.", "a {cat} {0}"]
    assert store.images.tolist() == [[0, 20, 24, 0], [0, 23, 24, 0]]
    store = ConversationStore(tmp_path / "generate")
    request = "Generate an image of {resolution_tag}, the content of image is "
    assert [texts(store.read(n).conversation) for n in range(2)] == [
        [f"{request}a {{cat}} {{0}}\n", "<image>"],
        [f"{request}a dog.\n", "<image>"],
    ]
    assert [store.read(n).images for n in range(2)] == [(png(0),), (png(3),)]
    assert store.images.tolist() == [[1, 20, 24, 2], [1, 23, 24, 2]]


EDITS = ["make it {blue}.", "add <image>", "Turn left ..", None, "."]


@pytest.mark.parametrize(
    "names",
    [
        ("original_image", "edited_image", "edit_prompt"),  # InstructPix2Pix
        ("source_image", "edited_image", "edit_prompt"),  # UltraEdit
        ("source_img", "target_img", "instruction"),  # MagicBrush
        ("before", "after", "how"),
    ],
)
def test_edits_in_parquet(names: tuple[str, str, str], tmp_path: Path, tokenizer: str) -> None:
    images = [{"bytes": png(n), "path": None} for n in range(6)]
    sources, targets = [*images[:4], images[0]], [images[5]] * 5
    table = pyarrow.table(
        {"mask": [0] * 5, names[1]: targets, names[0]: sources, names[2]: EDITS, "turn": [1] * 5}
    )
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    columns = ("source_column", "target_column", "instruction_column")
    given = dict(zip(columns, names, strict=True)) if names[0] == "before" else {}
    if given:
        with pytest.raises(
            ValueError, match=r"neither conversations .* nor edits .* has \['after', 'before'"
        ):
            prepare_conversations([str(tmp_path / "a.parquet")], tmp_path / "out", tokenizer=tokenizer)
    manifest = prepare_conversations(
        [str(tmp_path / "a.parquet")], tmp_path / "out", tokenizer=tokenizer, part_items=2, **given
    )[""]
    assert {reason: loss.examples for reason, loss in manifest.dropped.items()} == {
        "<image> or {resolution_tag} in the instruction": ("a.parquet#1",),
        "no instruction": ("a.parquet#3", "a.parquet#4"),
    }
    store = ConversationStore(tmp_path / "out")
    request = "<image>\nPlease edit the image according to the instruction: "
    assert [texts(store.read(n).conversation) for n in range(2)] == [
        [f"{request}make it {{blue}}.\n", "<image>"],
        [f"{request}Turn left.\n", "<image>"],
    ]
    assert store.read(1).images == (png(2), png(5))
    assert store.images_of(1).tolist() == [[0, 22, 24, 1], [1, 25, 24, 1]]


def test_edits_in_lines_beside_conversations(root: Path, tokenizer: str) -> None:
    edit = {"source": "pictures/0.png", "target": "pictures/1.png", "instruction": "make it blue"}
    edits = write_lines(root / "edits.jsonl", ["{", {**edit, "target": None}, edit])
    talks = write_lines(root / "talks.jsonl", GOOD[:1])
    manifest = prepare_conversations([edits, talks], root / "out", tokenizer=tokenizer)[""]
    assert {reason: loss.examples for reason, loss in manifest.dropped.items()} == {
        "unreadable JSON": ("edits.jsonl:1",), "no target image": ("edits.jsonl:2",),
    }  # fmt: skip
    store = ConversationStore(root / "out")
    assert [store.read(n).conversation.task for n in range(2)] == ["editing", "understanding"]
    forced = prepare_conversations(
        [talks, write_lines(root / "b.jsonl", ["{}"])], root / "forced", tokenizer=tokenizer, format="chat"
    )
    assert forced[""].dropped["no turns"].examples == ("b.jsonl:1",)


def test_conversations_in_parquet(root: Path, tokenizer: str) -> None:
    records = [{**record, "images": [{"bytes": png(n), "path": f"{n}.png"} for n in numbers]}
               for record, numbers in zip(GOOD[:3], IMAGES[:3], strict=True)]  # fmt: skip
    for record in records:
        record.pop("image", None)
        record.pop("id", None)
    parquet.write_table(pyarrow.Table.from_pylist(records), root / "a.parquet", row_group_size=2)
    prepare_conversations([str(root / "a.parquet")], root / "out", tokenizer=tokenizer)
    prepare_conversations([write_lines(root / "a.jsonl", GOOD[:3])], root / "lines", tokenizer=tokenizer)
    stores = ConversationStore(root / "out"), ConversationStore(root / "lines")
    for number in range(3):
        first, second = (store.read(number) for store in stores)
        assert first[:2] == second[:2]
        assert first.source == f"a.parquet#{number}"


def many(root: Path) -> str:
    """Conversations with one of six pictures or none, some bad."""
    records: list[Any] = []
    for number in range(40):
        image = {"image": f"pictures/{number % 7}.png"} if number % 3 else {}
        records.append(llava("<image>\nNumber?" if image else f"Say {number}.", str(number), **image))
    return write_lines(root / "many.jsonl", [*records, "{"])


def test_holdout_is_by_the_first_image_or_the_text(root: Path, tokenizer: str) -> None:
    made = prepare_conversations([many(root)], root / "out", tokenizer=tokenizer, holdout=0.4)
    stores = [ConversationStore(root / "out" / split) for split in ("train", "val")]
    seen = []
    for store in stores:
        records = [store.read(index) for index in range(len(store))]
        seen.append({record.images or record.conversation.to_json() for record in records})
    assert not seen[0] & seen[1]
    assert 5 < len(stores[1]) < len(stores[0])
    dropped = [sum(loss.count for loss in made[split].dropped.values()) for split in ("train", "val")]
    assert dropped == [4, 0]  # one line, and pictures/6.png three times
    assert sum(map(len, stores)) == 41 - sum(dropped)


def prepare_many(source: str, out: Path, tokenizer: str, **options: Any) -> dict[str, Manifest]:
    return prepare_conversations(
        [source], out, tokenizer=tokenizer, holdout=0.4, **{"part_items": 6, **options}
    )


def test_workers_interruptions_and_repetition_change_nothing(
    root: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = many(root)
    prepare_many(source, root / "one", tokenizer)
    assert {"train/rows.npz", "val/rows.npz"} < content(root / "one").keys()
    prepare_many(source, root / "two", tokenizer, num_workers=2)
    assert content(root / "two") == content(root / "one")

    replace, left = os.replace, 9

    def fail_later(*paths: Any) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise OSError(errno.ENOSPC, "full")
        replace(*paths)

    monkeypatch.setattr(os, "replace", fail_later)
    with pytest.raises(OSError, match="finished parts are kept"):
        prepare_many(source, root / "three", tokenizer)
    monkeypatch.undo()
    assert list((root / "three.partial" / "parts").glob("[0-9]*.json"))
    prepare_many(source, root / "three", tokenizer)
    assert content(root / "three") == content(root / "one")

    before = {path: path.stat().st_mtime_ns for path in (root / "three").rglob("*")}
    with caplog.at_level("INFO"):
        prepare_many(source, root / "three", tokenizer, num_workers=3)
    assert "is complete already" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in (root / "three").rglob("*")} == before
    with pytest.raises(ValueError, match="part_items was 6, is now 7"):
        prepare_many(source, root / "three", tokenizer, part_items=7)
    prepare_many(source, root / "three", tokenizer, part_items=7, overwrite=True)


def test_another_tokenizer_is_noticed(root: Path, tokenizer: str) -> None:
    prepare_many(many(root), root / "out", tokenizer)
    train_tokenizer(["Number Number Number"], root / "other", 265)
    with pytest.raises(ValueError, match="text_tokenizer was"):
        prepare_many(str(root / "many.jsonl"), root / "out", str(root / "other"))


def test_files_of_the_same_name_are_told_apart(root: Path, tokenizer: str) -> None:
    sources = []
    for name in ("a", "b"):
        (root / name).mkdir()
        sources.append(write_lines(root / name / "talks.jsonl", [llava(name, "x")]))
    prepare_conversations(sources, root / "out", tokenizer=tokenizer)
    store = ConversationStore(root / "out")
    assert [store.read(n).source for n in range(2)] == ["a/talks.jsonl:1", "b/talks.jsonl:1"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.json", b"", "a.json is empty"),
        ("a.json", b"[]", "holds no readable record"),
        ("a.json", b'[{"messages": []}', "does not end with the file"),
        ("a.json", b'[{"messages": [{]}', "does not end with the file"),
        ("a.json", b'[{"messages": "}]', "holds no readable record"),
        ("a.json", b'[{"messages": []}]\n[{}]', "does not end with the file"),
        ("a.jsonl", b"\xff\xfe\0{\n", "holds no readable record"),
        ("a.jsonl", b'{"prompt": "a", "answer": "b"}', r"its first record has \['answer', 'prompt'\]"),
        ("a.parquet", b"PAR2", "not a readable parquet file"),
        ("a.csv", b"a,b", "is no annotation file"),
    ],
)
def test_other_files_are_refused(
    name: str, data: bytes, message: str, tmp_path: Path, tokenizer: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        prepare_conversations([str(tmp_path / name)], tmp_path / "out", tokenizer=tokenizer)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"holdout": 1.0}, "holdout is 1.0"),
        ({"part_items": 0}, "part_items is 0"),
        ({"captions": "generate", "format": "chat"}, "format is 'chat', which only annotation files"),
        ({"image_column": "image"}, "image_column is 'image', which only --captions"),
        ({"format": "chat", "source_column": "a"}, "source_column is 'a', which only --format edit"),
        ({"sources": ["."]}, "is a folder; name its annotation files"),
        ({"sources": ["gone.jsonl"]}, "gone.jsonl does not exist"),
    ],
)
def test_options_that_make_no_sense(options: dict, message: str, root: Path, tokenizer: str) -> None:
    options = {"sources": [write_lines(root / "a.jsonl", GOOD[:1])], "tokenizer": tokenizer, **options}
    with pytest.raises(ValueError, match=message):
        prepare_conversations(output=root / "out", **options)
    with pytest.raises(FileNotFoundError, match="no text tokenizer"):
        prepare_conversations([str(root / "a.jsonl")], root / "out", tokenizer=str(root))


def test_sources_and_output_on_the_command_line(root: Path, tokenizer: str) -> None:
    sources = [write_lines(root / f"{name}.jsonl", [llava(name, "x")]) for name in "ab"]
    cli.main(["prepare", "conversations", *sources, str(root / "out"), "--tokenizer", tokenizer])
    assert len(ConversationStore(root / "out")) == 2
    cli.main(["prepare", "images", str(root / "pictures"), str(root / "images"), "--holdout=0"])
    assert len(ImageStore(root / "images")) == 6
