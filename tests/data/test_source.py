"""Sources: webdataset tars, parquet files and odd folders become records, and damage is named."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from illume_lightning.data.image import encode_png
from illume_lightning.data.prepare import prepare_images
from illume_lightning.data.store import ImageStore


def pixels(number: int) -> np.ndarray:
    random = np.random.default_rng(number)
    return random.integers(0, 256, (20 + number % 3, 24, 3), np.uint8)


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(number)).save(buffer, "JPEG")
    return buffer.getvalue()


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("part_items", [1, 3, 100])
def test_webdataset_tar(tmp_path: Path, part_items: int) -> None:
    long_name = "folder/" + "n" * 200  # needs an extra header in front of the file's own
    first = tar(tmp_path / "a.tar", {
        "00.jpg": jpeg(0), "00.txt": b"zero",
        "01.json": b'{"caption": "one", "url": "\\ud800"}', "01.png": encode_png(pixels(1)), "01.npy": b"",
        f"{long_name}.webp.txt": b"no image here",
        f"{long_name}2.jpg": jpeg(2),
        "03.jpg": jpeg(3), "03.seg.png": encode_png(pixels(9)), "03.json": b"{broken",
        "._04.jpg": b"mac", "../05.jpg": jpeg(5), "../05.txt": "f\u00fcnf".encode(),
    })  # fmt: skip
    second = tar(tmp_path / "b.tar", {"00.jpg": jpeg(6)})
    manifest = prepare_images([str(first), str(second)], tmp_path / "out", part_items=part_items)[""]
    store = ImageStore(tmp_path / "out")
    records = [store.read(index) for index in range(len(store))]
    assert [record.image for record in records] == [jpeg(0), encode_png(pixels(1)), jpeg(2), jpeg(5), jpeg(6)]
    assert [record.caption for record in records] == ["zero", "one", "", "f\u00fcnf", ""]
    assert json.loads(records[1].meta) == {"caption": "one", "url": "\ud800"}
    assert manifest.dropped["no image in the sample"].examples == (f"a.tar/{long_name}",)
    assert manifest.dropped["json not readable"].examples == ("a.tar/03",)
    assert sorted(os.listdir(tmp_path)) == [
        "a.tar",
        "b.tar",
        "out",
    ]  # nothing was extracted, inside or outside


def test_damaged_tars_are_named(tmp_path: Path) -> None:
    good = tar(tmp_path / "good.tar", {f"{n:02d}.jpg": jpeg(n) for n in range(5)}).read_bytes()
    for name, data in {
        "cut.tar": good[:1500],
        "header.tar": good[:1536] + b"x" * 512 + good[2048:],
        "zip.tar": b"PK\3\4" + bytes(2000),
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name} is damaged or is no uncompressed tar"):
            prepare_images([str(tmp_path / name)], tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("kind", ["struct", "binary"])
def test_parquet(tmp_path: Path, kind: str) -> None:
    import pyarrow
    from pyarrow import parquet

    images = [jpeg(number) if number != 4 else None for number in range(12)]
    captions = [f"caption {number}" if number else None for number in range(12)]
    column = [{"bytes": data, "path": None} for data in images] if kind == "struct" else images
    table = pyarrow.table({"id": list(range(12)), "picture": column, "text": captions, "note": ["n"] * 12})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    out = tmp_path / "out"
    manifest = prepare_images([str(tmp_path)], out, part_items=5)[""]
    store = ImageStore(out)
    assert [store.read(index).image for index in range(len(store))] == [data for data in images if data]
    assert store.read(1).caption == "caption 1"
    assert store.read(0).caption == ""
    assert manifest.dropped["no image bytes in the row"].examples == (f"{tmp_path.name}/a.parquet#4",)
    prepare_images([str(tmp_path / "a.parquet")], out, caption_column="note", overwrite=True)
    assert ImageStore(out).read(0).caption == "n"
    for options, message in [
        ({"image_column": "id"}, r"no image column 'id'; .* \['picture'\]"),
        ({"caption_column": "words"}, r"no text column 'words'; .* \['text', 'note'\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            prepare_images([str(tmp_path / "a.parquet")], tmp_path / "other", **options)
    (tmp_path / "b.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="b.parquet is not a readable parquet file"):
        prepare_images([str(tmp_path / "b.parquet")], tmp_path / "other")


@pytest.mark.parametrize("damage", ["page", "text"])
def test_damaged_rows_are_named(tmp_path: Path, damage: str) -> None:
    import pyarrow
    from pyarrow import parquet

    text = pyarrow.array([b"\xff" if damage == "text" else b"words"] * 4).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"image": [jpeg(0)] * 4, "text": text}), tmp_path / "a.parquet")
    if damage == "page":
        data = (tmp_path / "a.parquet").read_bytes()
        (tmp_path / "a.parquet").write_bytes(data[:4] + bytes(200) + data[204:])
    with pytest.raises(ValueError, match=r"(?s)a\.parquet is damaged .*; fetch it again and continue"):
        prepare_images([str(tmp_path / "a.parquet")], tmp_path / "out")


def test_a_caption_may_be_the_path_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.png").write_bytes(encode_png(pixels(0)))
    (tmp_path / "source" / "a.txt").write_text("secret.txt")
    monkeypatch.chdir(tmp_path)  # litdata would store the file that a text names
    prepare_images(["source"], "out")
    assert ImageStore("out").read(0).caption == "secret.txt"


def test_sources_without_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere does not exist"):
        prepare_images([str(tmp_path / "nowhere")], tmp_path / "out")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("only text")
    with pytest.raises(ValueError, match=r"empty has no images.*\.jpg"):
        prepare_images([str(tmp_path / "empty")], tmp_path / "out")
    (tmp_path / "empty" / "a.png").write_bytes(b"")
    (tmp_path / "empty" / "b.png").write_bytes(encode_png(np.zeros((5, 50, 3), np.uint8)))
    with pytest.raises(ValueError, match=r"no usable image \(dropped: 1 empty, 1 side below 16 px\)"):
        prepare_images([str(tmp_path / "empty")], tmp_path / "out")
    assert os.listdir(tmp_path) == ["empty"]
