"""Files to read, under names that do not depend on where they lie."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class InputFile:
    """One file to read, and a name for it that does not depend on where the source lies."""

    name: str
    path: Path
    root: Path | None = None
    """Folder that it was found in and must lie in; None for a file that the user named."""


def fingerprint(files: Iterable[InputFile]) -> str:
    """Hash of files' names, sizes and times of change (sha256, hexadecimal)."""
    digest = hashlib.sha256()
    for file in files:
        status = file.path.stat() if file.path.exists() else file.path.lstat()  # a link to nothing
        line = f"{file.name}\0{status.st_size}\0{status.st_mtime_ns}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
