"""Preparation: the same bytes after any interruption, nothing done twice, and clear refusals."""

import errno
import fcntl
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from litdata.streaming.writer import BinaryWriter
from PIL import Image

from illume_lightning.data.image import decode, encode_png
from illume_lightning.data.prepare import prepare_images
from illume_lightning.data.store import ImageStore

NUM_IMAGES = 25


def pixels(number: int) -> np.ndarray:
    random = np.random.default_rng(number)
    return random.integers(0, 256, (20 + number % 3, 24, 3), np.uint8)


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(number)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """25 pictures, captions for even numbers, one broken and one gray file, and things to ignore."""
    root = tmp_path_factory.mktemp("source") / "pictures"
    for number in range(NUM_IMAGES):
        path = root / f"sub{number % 2}" / f"{number:02d}.{'JPG' if number % 5 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number) if number % 5 else encode_png(pixels(number)))
        if number % 2 == 0:
            path.with_suffix(".txt").write_text(f" caption {number} \n")
    (root / "sub0" / "broken.jpg").write_bytes(jpeg(3)[:200])
    Image.fromarray(pixels(0)[..., 0]).save(root / "gray.png")
    (root / "notes.md").write_text("not an image")
    (root / ".hidden.png").write_bytes(encode_png(pixels(0)))
    return root


def content(path: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {
        str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()
    }


def test_folder(folder: Path, tmp_path: Path) -> None:
    manifest = prepare_images([str(folder)], tmp_path / "out", part_items=10)[""]
    store = ImageStore(tmp_path / "out")
    store.verify()
    assert len(store) == manifest.written == NUM_IMAGES + 1
    assert manifest.converted == {"gray": 1}
    assert manifest.dropped["damaged"].examples == ("pictures/sub0/broken.jpg",)
    names = sorted(
        path for path in folder.rglob("*.*") if path.suffix in (".JPG", ".png") and path.name[0] != "."
    )
    for index, path in enumerate(names):
        record = store.read(index)
        if path.name == "gray.png":
            assert (decode(record.image) == pixels(0)[..., :1]).all()
            continue
        number = int(path.stem)
        assert record.image == path.read_bytes()
        assert record.caption == (f"caption {number}" if number % 2 == 0 else "")
        assert record.meta == "{}"
        assert store.sizes[index].tolist() == [20 + number % 3, 24]
    assert os.listdir(tmp_path) == ["out"]


def test_holdout_is_by_content(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    for path in folder.rglob("*.JPG"):
        (tmp_path / "again" / f"copy-{path.name}").write_bytes(path.read_bytes())
    prepare_images([str(folder), str(tmp_path / "again")], tmp_path / "out", holdout=0.4)
    stores = {split: ImageStore(tmp_path / "out" / split) for split in ("train", "val")}
    images = {split: {store.read(i).image for i in range(len(store))} for split, store in stores.items()}
    assert not images["train"] & images["val"]
    assert len(stores["train"]) + len(stores["val"]) == NUM_IMAGES + 1 + 20
    assert 5 < len(stores["val"]) < len(stores["train"])
    with pytest.raises(ValueError, match=r"no usable image for the split 'val'"):
        prepare_images([str(folder)], tmp_path / "tiny", holdout=1e-9)
    assert not (tmp_path / "tiny.partial").exists()


@pytest.fixture(scope="module")
def reference(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """An uninterrupted preparation in one process."""
    out = tmp_path_factory.mktemp("reference") / "out"
    prepare_images([str(folder)], out, part_items=4, holdout=0.3)
    return content(out)


def test_killed_at_every_rename_and_continued(
    folder: Path, tmp_path: Path, reference: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    num_kills = 0
    while prepare_and_die(folder, out, num_kills) == 9:
        assert not out.exists()
        if num_kills % 3:  # sometimes leave the remains of several kills behind
            prepare_images([str(folder)], out, part_items=4, holdout=0.3)
            assert content(out) == reference
            out.rename(tmp_path / f"done{num_kills}")
        num_kills += 1
    assert num_kills > 10
    assert content(out) == reference


def prepare_and_die(folder: Path, out: Path, num_renames: int) -> int:
    """Prepare in a forked process that ends, without any clean-up, before a rename; its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    replace, remaining = os.replace, num_renames

    def count_down(source: Path, target: Path) -> None:
        nonlocal remaining
        if remaining == 0:
            os._exit(9)
        remaining -= 1
        replace(source, target)

    try:
        os.replace = count_down
        prepare_images([str(folder)], out, part_items=4, holdout=0.3)
        os._exit(0)
    finally:
        os._exit(1)


# Reading is slowed down, in the workers too, so that the kill comes in the middle.
SCRIPT = """
import sys, time
from illume_lightning.data.prepare import prepare_images
from illume_lightning.data.source import FolderPart
read = FolderPart.read
FolderPart.read = lambda part: (time.sleep(0.1) or item for item in read(part))
if __name__ == "__main__":
    prepare_images([sys.argv[1]], sys.argv[2], part_items=4, holdout=0.3, num_workers=2)
"""


def processes_of(folder: Path) -> list[int]:
    """Ids of the processes that work in a folder (Linux)."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cwd").readlink() == folder and "Z" not in (entry / "stat").read_text().split()[2]:
                found.append(int(entry.name))
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="looks at /proc")
def test_kill_9_with_workers_and_continued(folder: Path, tmp_path: Path, reference: dict[str, bytes]) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(tmp_path / "script.py"), str(folder), str(out)]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out.partial" / "parts").glob("[0-9]*.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while processes_of(tmp_path):  # the workers must not outlive the main process
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not out.exists()
    prepare_images([str(folder)], out, part_items=4, holdout=0.3)
    assert content(out) == reference


def test_again_does_nothing(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out"
    first = prepare_images([str(folder)], out)
    before = {path: path.stat().st_mtime_ns for path in [out, *out.rglob("*")]}
    with caplog.at_level("INFO"):
        assert prepare_images([str(folder)], out, num_workers=3) == first
    assert f"{out} is complete already" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in [out, *out.rglob("*")]} == before


def test_other_options_or_inputs_are_refused_or_overwrite(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare_images([str(folder)], out)
    with pytest.raises(ValueError, match="min_side was 16, is now 21.*overwrite=True"):
        prepare_images([str(folder)], out, min_side=21)
    source = tmp_path / "one"
    source.mkdir()
    (source / "a.png").write_bytes(encode_png(pixels(1)))
    with pytest.raises(ValueError, match="inputs was"):
        prepare_images([str(source)], out)
    (out / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="mine.txt is not part of the store"):
        prepare_images([str(source)], out, overwrite=True)
    (out / "mine.txt").unlink()
    prepare_images([str(source)], out, overwrite=True, holdout=0.0)
    assert len(ImageStore(out)) == 1
    assert os.listdir(tmp_path) != []
    assert sorted(os.listdir(tmp_path)) == ["one", "out"]
    (source / "a.png").write_bytes(encode_png(pixels(2)))
    with pytest.raises(ValueError, match="inputs was"):
        prepare_images([str(source)], out)


def test_foreign_folders_are_left_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="thesis exists and is not a store"):
            prepare_images([str(folder)], tmp_path / "thesis", overwrite=overwrite)
    (tmp_path / "empty").mkdir()
    assert prepare_images([str(folder)], tmp_path / "empty")[""].written == NUM_IMAGES + 1
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial" / "chapter.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"mine.partial/chapter.txt was made by no preparation"):
            prepare_images([str(folder)], tmp_path / "mine", overwrite=overwrite)
    for name in ("thesis", "mine.partial"):
        assert (tmp_path / name / "chapter.txt").read_text() == "precious"


def test_full_disk_keeps_finished_parts(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: dict[str, bytes]
) -> None:
    out, write = tmp_path / "out", BinaryWriter.write_chunk_to_file
    written = []

    def fill(self: BinaryWriter, data: bytes, name: str, **options: bool) -> None:
        if len(written) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(name)
        write(self, data, name, **options)

    monkeypatch.setattr(BinaryWriter, "write_chunk_to_file", fill)
    with pytest.raises(OSError, match="no space left for .*out.partial; finished parts are kept") as caught:
        prepare_images([str(folder)], out, part_items=4, holdout=0.3)
    assert caught.value.errno == errno.ENOSPC
    assert not out.exists()
    parts = tmp_path / "out.partial" / "parts"
    done = {path.name: path.stat().st_mtime_ns for path in parts.glob("[0-9]*")}
    assert list(done)
    assert all(name.endswith(".json") for name in done)
    with pytest.raises(ValueError, match="interrupted preparation from other inputs or with other options"):
        prepare_images([str(folder)], out, part_items=5, holdout=0.3)
    monkeypatch.undo()
    prepare_images([str(folder)], out, part_items=4, holdout=0.3)
    assert content(out) == reference


def test_overwrite_starts_an_interrupted_preparation_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: dict[str, bytes]
) -> None:
    def fill(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("illume_lightning.data.writer._finish", fill)
    with pytest.raises(OSError, match="no space"):
        prepare_images([str(folder)], tmp_path / "out", part_items=3)
    monkeypatch.undo()
    assert list((tmp_path / "out.partial").glob("chunk-*"))
    prepare_images([str(folder)], tmp_path / "out", part_items=4, holdout=0.3, overwrite=True)
    assert content(tmp_path / "out") == reference  # and no chunk of the first one


def test_two_at_once_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial" / "parts").mkdir(parents=True)
    with (tmp_path / "out.partial" / "parts" / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match="another process is writing"):
            prepare_images([str(folder)], tmp_path / "out")
    prepare_images([str(folder)], tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"holdout": 1.0}, "holdout is 1.0"),
        ({"part_items": 0}, "part_items is 0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"chunk_megabytes": 0}, "chunk_megabytes=0"),
    ],
)
def test_options_out_of_range(folder: Path, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_images([str(folder)], tmp_path / "out", **options)
