"""Annotation files with anything in them: each record becomes a conversation or is named with its line."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prepare_conversations import GOOD, png

from illume_lightning.data.conversation_source import AnnotationReader, EditColumns
from illume_lightning.data.image import Limits
from illume_lightning.data.part import Lost
from illume_lightning.data.prepare_conversations import prepare_conversations
from illume_lightning.data.source import Rules
from illume_lightning.data.text_tokenizer import TextTokenizer, train_tokenizer


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures, with a text tokenizer."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "pictures").mkdir()
    for number in range(6):
        (folder / "pictures" / f"{number}.png").write_bytes(png(number))
    train_tokenizer(["a cat and a dog"], folder / "text", 270)
    return folder


leaves = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12)),
    st.sampled_from(
        [
            *(
                "<image>",
                "{resolution_tag}",
                "pictures/0.png",
                "../../etc/passwd",
                "/dev/zero",
                "/etc/passwd",
                "\ud800",
            ),
            *(
                "user",
                "assistant",
                "human",
                "gpt",
                "system",
                "file:///etc/passwd",
                "http://x/y.png",
                "pictures",
                ".",
                "\0",
            ),
            *("a" * 300, "data:image/png;base64,AAAA", "<|im_start|>", "x/" * 3000),
        ]
    ),
)
keys = st.sampled_from(
    [
        *(
            "conversations",
            "messages",
            "from",
            "value",
            "role",
            "content",
            "image",
            "images",
            "type",
            "text",
            "path",
        ),
        *("url", "bytes", "image_url", "source_image", "target_image", "instruction", "id", ""),
    ]
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)


def sample(root: Path, record: object, columns: EditColumns | None = None) -> Any:
    reader = AnnotationReader(Rules(Limits(), 0.0), TextTokenizer(root / "text"), root, columns)
    return reader.sample("talks.jsonl:7", record)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(values, st.booleans())
def test_any_value_is_a_sample_or_lost(root: Path, value: object, is_edit: bool) -> None:
    columns = EditColumns("source_image", "target_image", "instruction") if is_edit else None
    for record in (
        value,
        json.dumps(value).encode(),
        {"conversations": value},
        {"messages": [value], "image": value},
    ):
        found = sample(root, record, columns)
        if isinstance(found, Lost):
            assert found.name == "talks.jsonl:7"
            assert found.reason and "\n" not in found.reason and str(root) not in found.reason


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from(GOOD), st.randoms(use_true_random=False), leaves)
def test_one_change_of_a_good_record(
    root: Path, record: dict[str, Any], draw: random.Random, leaf: object
) -> None:
    changed = json.loads(json.dumps(record))
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(changed)
    node, key = draw.choice(places)
    if draw.random() < 0.4:
        del node[key]
    else:
        node[key] = leaf
    found = sample(root, changed)
    assert not isinstance(found, Lost) or (found.name == "talks.jsonl:7" and found.reason)


BYTES = (
    b"\x00",
    b"\xff",
    b"\n",
    b"\r",
    b'"',
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b"\xed\xa0\x80",
    b"\xe2\x80\xa8",
    b"",
)


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_files_with_changed_bytes_are_read_line_by_line_or_refused(root: Path, suffix: str) -> None:
    lines = [json.dumps(record).encode() for record in GOOD]
    good = b"\n".join(lines) if suffix == ".jsonl" else b"[" + b",\n".join(lines) + b"]"
    path, report, draw = root / f"talks{suffix}", root / f"report{suffix}.txt", random.Random(1)
    refused = named = 0
    for number in range(150):
        content = bytearray(good)
        for _ in range(draw.randrange(1, 5)):
            place = draw.randrange(len(content) + 1)
            content[place : place + draw.randrange(3)] = draw.choice(BYTES) * draw.choice([1, 1, 1, 2000])
        path.write_bytes(content[: draw.randrange(len(content))] if number % 5 == 0 else content)
        try:
            prepare_conversations([str(path)], root / "out", tokenizer=str(root / "text"), report=str(report))
        except ValueError as error:
            refused += 1
            complaint = str(error)
        else:
            complaint = ""
            told = report.read_text(encoding="utf-8").splitlines()
            named += len(told)
            pattern = r"talks\.jsonl:\d+\t.+" if suffix == ".jsonl" else r"talks\.json#\d+\t.+"
            assert all(re.fullmatch(pattern, line) for line in told), told
        assert not complaint or (str(path) in complaint and "\n" not in complaint), complaint
    assert named > 50
    assert suffix == ".jsonl" or refused > 10
