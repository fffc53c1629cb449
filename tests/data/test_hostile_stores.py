"""Stores that a disk broke or a manifest lies about: the sample that was written, or an error that names it."""

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from broken_stores import edit_manifest, flip, forget_files
from hypothesis import given, settings
from hypothesis import strategies as st

from illume_lightning.data.check import check_stores
from illume_lightning.data.part import Lost, Sample
from illume_lightning.data.store import DamagedRecord, ImageStore, Record, record_check
from illume_lightning.data.writer import write_stores
from illume_lightning.lit.planned_data import open_store

COUNT = 12


def record(index: int) -> Record:
    random = np.random.default_rng(index)
    return Record(random.bytes(200 + 10 * index), f"caption {index} \u00e9", f'{{"n":{index}}}')


@dataclass(frozen=True)
class SmallPart:
    """Half of the records."""

    number: int
    num_items: int = COUNT // 2

    def read(self) -> Iterator[Sample | Lost]:
        for index in range(self.number * self.num_items, (self.number + 1) * self.num_items):
            yield Sample(str(index), *record(index), 100 + index, 200 + index)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two chunks of six records."""
    path = tmp_path_factory.mktemp("store") / "small"
    write_stores(path, {"kind": "images"}, lambda: [SmallPart(0), SmallPart(1)])
    return path


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "small"))


def read_all(path: Path) -> None:
    store = ImageStore(path)
    assert [store.read(index) for index in range(COUNT)] == [record(index) for index in range(COUNT)]


CHUNK = "chunk-000000-000.bin"


# -- chunks --


def test_every_byte_of_a_chunk_counts(written: Path, copied: Path) -> None:
    data = (written / CHUNK).read_bytes()
    offsets = np.frombuffer(data[4:32], "<u4")
    for place in range(0, len(data), 3):
        flip(copied / CHUNK, place, 1 << (place % 8))
        store, found = ImageStore(copied), []
        for index in range(COUNT):
            try:
                assert store.read(index) == record(index), (place, index)
            except DamagedRecord as damaged:
                found.append(index)
                text = str(damaged)
                assert (
                    f"record {index} of {copied} is damaged (" in text and CHUNK in text and "\n" not in text
                )
        if place >= 32:  # in a record: this one, and no other
            owner = int(np.searchsorted(offsets, place, side="right")) - 1
            assert found == [owner] or (found == [] and place < offsets[owner] + 12), (
                place
            )  # lengths may not matter
        shutil.copy(written / CHUNK, copied)


def test_a_border_that_moves_between_fields_is_noticed() -> None:
    assert record_check(b"ab", b"c", b"") != record_check(b"a", b"bc", b"")


@pytest.mark.parametrize("damage", ["cut", "longer", "gone", "emptied"])
def test_a_chunk_that_changes_while_it_is_read(damage: str, copied: Path) -> None:
    store = ImageStore(copied)
    assert store.read(0) == record(
        0
    )  # the chunk is mapped now; reading behind its new end would kill the process
    data = (copied / CHUNK).read_bytes()
    if damage == "gone":
        (copied / CHUNK).unlink()
    else:
        changed = {"cut": data[:-50], "longer": data + b"\0", "emptied": b""}[damage]
        (copied / CHUNK).write_bytes(changed)
    for index in (0, 5):
        with pytest.raises(DamagedRecord, match=rf"record {index} of .*{CHUNK}; copy this file again"):
            store.read(index)
    assert store.read(6) == record(6)


def test_chunks_of_another_store(copied: Path) -> None:
    other = copied / "chunk-000001-000.bin"
    first, second = (copied / CHUNK).read_bytes(), other.read_bytes()
    assert len(first) < len(second)
    (copied / CHUNK).write_bytes(second[: len(first)])
    store = ImageStore(copied)
    for index in range(6):
        with pytest.raises(DamagedRecord):
            store.read(index)


# -- the files beside --


@pytest.mark.parametrize("name", ["index.json", "sizes.npy", "checks.npy"])
def test_files_beside_the_chunks_are_compared(name: str, copied: Path) -> None:
    for place in (0, 40, -1):
        flip(copied / name, place)
        with pytest.raises(
            ValueError, match=rf"{name} is not the file that manifest.json is of \(sha256\); copy"
        ):
            ImageStore(copied)
        flip(copied / name, place)
    (copied / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing; copy the store again"):
        ImageStore(copied)


def test_a_store_of_an_older_version(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    forget_files(copied)
    (copied / "checks.npy").unlink()
    fingerprint = ImageStore(copied).manifest.fingerprint
    with caplog.at_level(logging.WARNING):
        assert not open_store(ImageStore, str(copied)).has_checks
    assert f"`illume prepare check {copied}`" in caplog.text
    flip(copied / CHUNK, 100)
    ImageStore(copied).read(0)  # nobody can tell
    with pytest.raises(ValueError, match=f"1 of 2 chunks .*{CHUNK}"):
        check_stores(str(copied))
    assert not (copied / "checks.npy").exists()
    flip(copied / CHUNK, 100)
    check_stores(str(copied.parent))
    store = ImageStore(copied)
    assert store.has_checks and store.manifest.fingerprint == fingerprint
    read_all(copied)
    flip(copied / CHUNK, 100)
    with pytest.raises(DamagedRecord):
        ImageStore(copied).read(0)


def test_checking_a_whole_store_changes_nothing(copied: Path) -> None:
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    check_stores(str(copied))
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before
    with pytest.raises(FileNotFoundError, match="no store at"):
        check_stores(str(copied / "nowhere"))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"chunks": 3}',
        b'{"chunks": [{}]}',
        b'{"chunks": [null]}',
    ],
)
def test_an_index_that_is_none(content: bytes, copied: Path) -> None:
    forget_files(copied)
    (copied / "index.json").write_bytes(content)
    with pytest.raises(ValueError, match="index.json is damaged; copy the store again"):
        ImageStore(copied)


@pytest.mark.parametrize(
    "sizes",
    [
        np.full((COUNT, 2), -1),
        np.ones((COUNT, 2)),
        np.array([[None, "x"]] * COUNT),
        np.zeros((COUNT, 3), int),
    ],
    ids=["negative", "fractions", "objects", "three"],
)
def test_sizes_that_are_none(sizes: np.ndarray, copied: Path) -> None:
    forget_files(copied)
    np.save(copied / "sizes.npy", sizes)
    with pytest.raises(ValueError, match=r"sizes.npy (is damaged|has shape|holds other values)"):
        ImageStore(copied)


# -- manifests that lie --

CHUNKS = [
    {"filename": "chunk-000000-000.bin", "num_bytes": 1, "num_items": 6, "sha256": "0" * 64},
    {"filename": "chunk-000001-000.bin", "num_bytes": 1, "num_items": 6, "sha256": "1" * 64},
]


def chunks(**changed: object) -> dict[str, object]:
    return {"chunks": [CHUNKS[0] | changed, CHUNKS[1]]}


LIES: list[tuple[dict[str, Any], str]] = [
    ({"written": 11}, "written is 11, and its chunks hold 12 records"),
    ({"written": -1}, "written is -1, no whole number"),
    ({"written": 10**30}, "written is 1000"),
    ({"written": "12"}, "written is '12', no whole number"),
    ({"written": 12.0}, "written is 12.0"),
    ({"written": True}, "written is True"),
    ({"written": None}, "written is None"),
    ({"chunks": {}}, "chunks is {}, not a JSON array"),
    ({"chunks": []}, "its chunks hold 0 records"),
    ({"chunks": [3]}, r"chunks\[0\] does not have the entries filename, num_bytes, num_items, sha256"),
    ({"chunks": [CHUNKS[0] | {"more": 1}]}, r"chunks\[0\] does not have the entries"),
    ({"chunks": [CHUNKS[0], CHUNKS[0]]}, "chunk-000000-000.bin is listed 2 times"),
    (chunks(filename="../../chunk.bin"), r"'../../chunk.bin' is not that of a file in the store's folder"),
    (chunks(filename="/etc/passwd"), "'/etc/passwd' is not that of a file"),
    (chunks(filename=".."), "'..' is not that of a file"),
    (chunks(filename="a\nb"), r"'a\\nb' is not that of a file"),
    (chunks(filename=7), r"chunks\[0\] has the file name 7"),
    (chunks(num_items=-6), r"chunks\[0\].num_items is -6"),
    (chunks(num_items=2**31), r"chunks\[0\].num_items is 2147483648"),
    (chunks(num_items=7), "its chunks hold 13 records"),
    (chunks(num_bytes=-1), r"chunks\[0\].num_bytes is -1"),
    (chunks(num_bytes=2**60), r"chunks\[0\].num_bytes is 11529"),
    (chunks(sha256="xyz"), r"the sha256 of chunks\[0\] is 'xyz'"),
    (chunks(sha256=None), r"the sha256 of chunks\[0\] is None"),
    ({"identity": "images"}, "identity is 'images', not a JSON object"),
    ({"dropped": [1]}, r"dropped is \[1\], not a JSON object"),
    ({"dropped": {"x": 3}}, "dropped\\['x'\\] is no count with examples"),
    ({"dropped": {"x": {"count": -3, "examples": []}}}, r"dropped\['x'\] is -3"),
    ({"converted": {"gray": "many"}}, r"converted\['gray'\] is 'many'"),
    ({"sizes": 3}, "sizes is 3"),
    ({"files": {"../x": "0" * 64}}, "'../x' is not that of a file"),
    ({"files": {"sizes.npy": "0"}}, "the sha256 of sizes.npy is '0'"),
    ({"files": []}, r"files is \[\]"),
    ({"surprise": 1}, "an entry 'surprise', which this version does not know"),
]


@pytest.mark.parametrize(("entries", "message"), LIES, ids=[str(number) for number in range(len(LIES))])
def test_manifests_that_lie(entries: dict[str, Any], message: str, copied: Path) -> None:
    edit_manifest(copied, **entries)
    with pytest.raises(ValueError, match=rf"manifest.json cannot be true: .*{message}") as caught:
        ImageStore(copied)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert "prepare the data again" in str(caught.value)


def test_manifests_that_lie_about_files(copied: Path) -> None:
    listed = json.loads((copied / "manifest.json").read_text())["chunks"]
    for changed, message in [
        ([listed[1], listed[0]], "index.json and manifest.json list different chunks"),
        ([listed[0], listed[1] | {"filename": "chunk-9.bin"}], "chunk-9.bin is missing"),
        ([listed[0] | {"num_bytes": 5}, listed[1]], f"{CHUNK} has .* bytes instead of 5"),
        ([listed[0] | {"num_items": 5}, listed[1] | {"num_items": 7}], "list different chunks"),
    ]:
        edit_manifest(copied, chunks=changed)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            ImageStore(copied)
    edit_manifest(copied, chunks=[listed[0] | {"sha256": "0" * 64}, listed[1]])
    with pytest.raises(ValueError, match=f"1 of 2 chunks .* differ .*{CHUNK}"):
        ImageStore(copied).verify()


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"3", b"null", b"[" * 100_000, b'{"version": 1', b"\xff\xfe{", b'{"a": 1}']
)
def test_files_that_are_no_manifest(content: bytes, copied: Path) -> None:
    (copied / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match="is not the manifest of a store; prepare the data again"):
        ImageStore(copied)


@pytest.mark.parametrize("version", [0, 2, -1, 10**40, "1", None, [], 1.5])
def test_manifests_of_other_versions(version: object, copied: Path) -> None:
    content = json.loads((copied / "manifest.json").read_text()) | {"version": version}
    (copied / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="format version .*, this code reads 1; prepare the data again"):
        ImageStore(copied)


# -- fuzz --

FLIPS = st.lists(
    st.tuples(st.integers(0, 4), st.floats(0, 1, exclude_max=True), st.integers(1, 255)),
    min_size=1,
    max_size=4,
)


def holds_for(store: Path, pristine: Path, flips: list[tuple[int, float, int]]) -> None:
    """Whatever is flipped: each record is what was written, or a known error; never another one."""
    names = sorted(path.name for path in pristine.iterdir())
    for number, share, mask in flips:
        path = store / names[number]
        flip(path, int(share * path.stat().st_size), mask)
    message = "again"
    try:
        opened = ImageStore(store)
        for index in range(len(opened)):
            try:
                assert opened.read(index) == record(index)
                assert opened.sizes[index].tolist() == [100 + index, 200 + index]
            except DamagedRecord:
                continue
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
    finally:
        for name in {names[number] for number, _, _ in flips}:
            shutil.copy(pristine / name, store)
    assert "again" in message


@pytest.fixture(scope="module")
def target(written: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(written, tmp_path_factory.mktemp("target") / "small"))


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(flips=FLIPS)
def test_flipped_bytes(target: Path, written: Path, flips: list[tuple[int, float, int]]) -> None:
    holds_for(target, written, flips)


@pytest.mark.slow
@settings(max_examples=5000, derandomize=True, deadline=None, database=None)
@given(flips=FLIPS)
def test_many_flipped_bytes(target: Path, written: Path, flips: list[tuple[int, float, int]]) -> None:
    holds_for(target, written, flips)
