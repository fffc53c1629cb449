"""Files that are whole at every instant, with a sha256 beside them as ``sha256sum -c`` reads it.

A file is written under another name, brought to the disk, and renamed. File and sum never contradict one another,
whenever the process is killed: the sum of a new file is there before the file, and that of a file which is replaced
goes before the file does. So a sum that differs means damage, and a missing one only that nobody knows.
"""

import hashlib
import os
import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

SUM = ".sha256"
WRITING = ".writing"
DAMAGED = ".damaged"

_BROKEN = (
    *(zipfile.BadZipFile, zlib.error, struct.error),
    *(EOFError, ValueError, NotImplementedError, RuntimeError, OverflowError),
)
"""What zipfile raises at bytes that are no archive, or half of one."""


class HashedFile:
    """Hashes what it writes; only for writing from beginning to end.

    Args:
        file: Without a buffer.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        """Write all of it; returns the number of bytes."""
        view = memoryview(data).cast("B")
        size = len(view)
        self._hash.update(view)
        while view:
            view = view[self._file.write(view) :]
        return size

    def flush(self) -> None:
        """Nothing is kept back."""

    def digest(self) -> str:
        """Of what was written so far, hexadecimal."""
        return self._hash.hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[HashedFile]:
    """Write a file that takes its place when the block ends well; otherwise nothing is left of it.

    Raises:
        OSError: If it can't be written; what was there before stays as it was.
    """
    scratch = _scratch(path)
    try:
        with scratch.open("wb", buffering=0) as raw:
            file = HashedFile(raw)
            yield file
            os.fsync(raw.fileno())
        _publish(scratch, path, file.digest())
    finally:
        scratch.unlink(missing_ok=True)


def link(source: Path, path: Path) -> None:
    """Let a file be found under a second name: by a hard link, or where the file system has none by a copy.

    Raises:
        OSError: If it can't be made; what was there before stays as it was.
    """
    scratch = _scratch(path)
    try:
        scratch.unlink(missing_ok=True)
        try:
            os.link(source, scratch)
        except OSError:
            shutil.copy2(source, scratch)
            with scratch.open("rb") as file:
                os.fsync(file.fileno())
        _publish(scratch, path, read_sum(source) or hash_file(source))
    finally:
        scratch.unlink(missing_ok=True)  # renaming a link over its like leaves both


def remove(path: Path) -> None:
    """Remove a file and then its sum, where they are there."""
    path.unlink(missing_ok=True)
    sum_of(path).unlink(missing_ok=True)


def move_aside(path: Path) -> Path:
    """Rename a damaged file, with its sum, to one that nobody takes for a whole one; returns its new name."""
    number, aside = 1, path.with_name(path.name + DAMAGED)
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}{DAMAGED}-{number}")
    path.rename(aside)
    if sum_of(path).exists():
        sum_of(path).rename(sum_of(aside))
    return aside


def leftovers(folder: Path) -> list[Path]:
    """What processes that were killed had begun to write."""
    return sorted(folder.glob("*" + WRITING))


def sum_of(path: Path) -> Path:
    """The file with its sum."""
    return path.with_name(path.name + SUM)


def read_sum(path: Path) -> str | None:
    """The sha256 that a file was written with; none where it is unknown."""
    file = sum_of(path)
    if not file.is_file():
        return None
    found = re.match(r"([0-9a-f]{64}) [ *]", file.read_text(encoding="utf-8", errors="replace"))
    return found and found[1]


def hash_file(path: Path) -> str:
    """The sha256 of its content, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(path: Path) -> str:
    """What is wrong with a file of ``torch.save``, "" if nothing is: by its sum, else by the checksums within."""
    expected = read_sum(path)
    if path.stat().st_size == 0:
        return "it is empty"
    if expected is not None:
        return "" if hash_file(path) == expected else f"its sha256 is not that in {sum_of(path).name}"
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
    except _BROKEN as error:
        return f"it is cut off, or no file of torch.save ({error})"
    return "" if wrong is None else f"{wrong} in it is not what was written"


def _publish(scratch: Path, path: Path, digest: str) -> None:
    is_new = not path.exists()
    if is_new:
        _write_sum(path, digest)
    elif sum_of(path).exists():
        sum_of(path).unlink()
        _sync(path.parent)
    os.replace(scratch, path)
    _sync(path.parent)
    if not is_new:
        _write_sum(path, digest)


def _write_sum(path: Path, digest: str) -> None:
    scratch = _scratch(sum_of(path))
    try:
        with scratch.open("w", encoding="utf-8") as file:
            file.write(f"{digest}  {path.name}\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, sum_of(path))
        _sync(path.parent)
    finally:
        scratch.unlink(missing_ok=True)


def _scratch(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}{WRITING}")


def _sync(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
