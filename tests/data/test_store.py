"""A store gives back what was written, in any process, and notices when its files are broken."""

import json
import os
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from broken_stores import forget_files
from torch.utils.data import DataLoader, Dataset

from illume_lightning.data.part import Lost, Sample
from illume_lightning.data.store import ImageStore, Manifest, Record, find_stores
from illume_lightning.data.writer import write_stores

NUM_PARTS, PART_ITEMS = 3, 10


@dataclass(frozen=True)
class NoisePart:
    """Records of random bytes; every seventh input is lost."""

    number: int
    num_items: int = PART_ITEMS

    def read(self) -> Iterator[Sample | Lost]:
        for index in range(self.number * PART_ITEMS, (self.number + 1) * PART_ITEMS):
            if index % 7 == 6:
                yield Lost(f"input {index}", "noise")
            else:
                yield Sample(str(index), *noise(index), 100 + index, 200 + index, ("gray",) * (index % 2))


def noise(index: int) -> Record:
    random = np.random.default_rng(index)
    return Record(
        random.bytes(int(random.integers(1, 400_000))), f"caption {index} \u00e9", f'{{"index":{index}}}'
    )


KEPT = [index for index in range(NUM_PARTS * PART_ITEMS) if index % 7 != 6]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "noise"
    write_stores(path, {"kind": "noise"}, lambda: [NoisePart(n) for n in range(NUM_PARTS)], chunk_megabytes=1)
    return path


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    """A store of one's own, to break."""
    return Path(shutil.copytree(written, tmp_path / "noise"))


def test_records_come_back_by_index(written: Path) -> None:
    store = ImageStore(written)
    assert len(store) == len(KEPT)
    for position in np.random.default_rng(0).permutation(len(KEPT)):
        record = store.read(position)
        assert record == noise(KEPT[position])
        assert [type(field) for field in record] == [bytes, str, str]
    for index in (-1, len(KEPT)):
        with pytest.raises(IndexError, match=str(index)):
            store.read(index)
    assert {path.name for path in written.iterdir()} == {
        "index.json", "sizes.npy", "checks.npy", "manifest.json", *(chunk.filename for chunk in store.manifest.chunks)
    }  # fmt: skip


def test_sizes_and_chunks_need_no_reading(written: Path) -> None:
    store = ImageStore(written)
    assert store.sizes.dtype == np.int32
    assert store.sizes.tolist() == [[100 + i, 200 + i] for i in KEPT]
    assert store.chunk_ids.dtype == np.int32
    assert store.chunk_ids.shape == (len(KEPT),)
    index = json.loads((written / "index.json").read_text())
    assert index["config"]["data_format"] == ["bytes", "bytes", "bytes"]  # no Arrow, no paths taken for files
    chunks = index["chunks"]
    assert np.bincount(store.chunk_ids).tolist() == [chunk["chunk_size"] for chunk in chunks]
    assert len(chunks) > NUM_PARTS  # the megabyte was respected inside parts


def test_manifest(written: Path) -> None:
    manifest = ImageStore(written).manifest
    assert manifest.written == len(KEPT)
    assert manifest.dropped["noise"].count == 4
    assert manifest.dropped["noise"].examples == ("input 6", "input 13", "input 20", "input 27")
    assert manifest.converted == {"gray": sum(index % 2 for index in KEPT)}
    assert manifest.sizes["height"] == {"min": 100, "median": 114, "max": 129}
    assert sum(chunk.num_items for chunk in manifest.chunks) == len(KEPT)
    assert Manifest.read(written / "manifest.json") == manifest
    assert manifest.identity["kind"] == "noise"
    assert manifest.packages["litdata"]


def test_verify_finds_one_flipped_bit(copied: Path) -> None:
    store = ImageStore(copied)
    store.verify()
    chunk = copied / store.manifest.chunks[2].filename
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    ImageStore(copied)  # sizes are right, so opening does not see it
    with pytest.raises(ValueError, match=f"1 of {len(store.manifest.chunks)} chunks .* {chunk.name}"):
        store.verify()


def test_broken_folders_are_refused_with_the_way_out(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no store at .*nowhere; prepare it"):
        ImageStore(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="has no manifest.json"):
        ImageStore(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="holds 1 stores; name one: .*noise"):
        ImageStore(tmp_path)
    (tmp_path / "half.partial").mkdir()
    for name in ("half", "half.partial"):
        with pytest.raises(FileNotFoundError, match="interrupted; run the same command again"):
            ImageStore(tmp_path / name)
    chunk = copied / ImageStore(copied).manifest.chunks[1].filename
    data = chunk.read_bytes()
    chunk.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=f"{chunk.name} has {len(data) - 1} bytes instead of {len(data)}"):
        ImageStore(copied)
    chunk.unlink()
    with pytest.raises(FileNotFoundError, match=f"{chunk.name} is missing"):
        ImageStore(copied)


def test_contradicting_files_are_refused(copied: Path) -> None:
    sizes = np.load(copied / "sizes.npy")
    np.save(copied / "sizes.npy", sizes[1:])
    with pytest.raises(ValueError, match=r"sizes.npy is not the file that manifest.json is of \(sha256\)"):
        ImageStore(copied)
    forget_files(copied)
    with pytest.raises(ValueError, match=r"shape \(25, 2\), the manifest counts 26"):
        ImageStore(copied)
    np.save(copied / "sizes.npy", sizes)
    index = json.loads((copied / "index.json").read_text())
    index["chunks"].reverse()
    (copied / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="list different chunks"):
        ImageStore(copied)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "not the manifest"), ('{"version": 99}', "version 99")]
)
def test_foreign_manifests_are_refused(copied: Path, content: str, message: str) -> None:
    (copied / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        ImageStore(copied)


def test_find_stores(written: Path, tmp_path: Path) -> None:
    assert list(find_stores(written)) == [written]
    assert list(find_stores(written.parent)) == [written]
    assert list(find_stores(tmp_path / "nowhere")) == []


class Captions(Dataset[str]):
    def __init__(self, store: ImageStore) -> None:
        self.store = store

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> str:
        return self.store.read(index).caption


def test_worker_processes_read_the_same(written: Path) -> None:
    store = ImageStore(written)
    store.read(0)  # opened here first: workers must not share the handle
    assert pickle.loads(pickle.dumps(store)).read(3) == store.read(3)
    loader = DataLoader(Captions(store), batch_size=4, num_workers=2)
    assert [caption for batch in loader for caption in batch] == [noise(index).caption for index in KEPT]


def test_reading_deletes_nothing_and_writes_nothing(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_CACHE_SIZE", "1KB")  # litdata removes chunks of remote data beyond this
    before = {path.name: path.stat().st_mtime_ns for path in written.iterdir()}
    store = ImageStore(written)
    for index in range(len(store)):
        store.read(index)
    del store
    assert {path.name: path.stat().st_mtime_ns for path in written.iterdir()} == before
    assert os.listdir(written.parent) == ["noise"]
