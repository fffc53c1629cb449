"""Reading files that a data set names: no way out of its folder, no pipes or devices, nothing without end."""

import os
from pathlib import Path

MAX_BYTES = 2**30
"""Most bytes of an image's file, 1 GiB: beyond the largest image that may be decoded."""

MAX_TEXT_BYTES = 2**24
"""Most bytes of a caption's file, 16 MiB."""

NOT_A_FILE = "not a file"
NOT_READABLE = "file not readable"
TOO_LARGE = "file too large"
OUTSIDE = "outside of the folder"
LINK_OUTSIDE = "link out of the folder"


class RefusedFile(Exception):
    """Why a file is not read: one of this module's reasons."""


def read_file(
    path: Path, root: Path | None, *, follow_links: bool = False, max_bytes: int = MAX_BYTES
) -> bytes:
    """The content of a file that somebody else named.

    Args:
        path: Of the file.
        root: Folder that it must lie in; None for a file that the user named.
        follow_links: Read links that lead out of the folder too.
        max_bytes: Of the largest file that is read.

    Raises:
        RefusedFile: If it is none, leaves the folder, cannot be read or is too large.
    """
    try:
        if root is not None:
            _check_place(path, root, follow_links)
        if not path.is_file():  # also of names that no file can have; pipes and devices would never end
            raise RefusedFile(NOT_A_FILE)
        if path.stat().st_size > max_bytes:
            raise RefusedFile(TOO_LARGE)
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise RefusedFile(NOT_READABLE if isinstance(error, PermissionError) else NOT_A_FILE) from error
    if len(data) > max_bytes:  # files of /proc say that they are empty
        raise RefusedFile(TOO_LARGE)
    return data


def _check_place(path: Path, root: Path, follow_links: bool) -> None:
    if not _is_below(os.path.abspath(path), os.path.abspath(root)):
        raise RefusedFile(OUTSIDE)
    if not follow_links and not _is_below(os.path.realpath(path), os.path.realpath(root)):
        raise RefusedFile(LINK_OUTSIDE)


def _is_below(path: str, root: str) -> bool:
    return os.path.commonpath([path, root]) == root
