"""A lock on a folder, so that no two processes write to it at once."""

import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

LOCK = "lock"

log = logging.getLogger(__name__)

_held: set[IO[bytes]] = set()


def _let_go() -> None:
    """Forked workers would hold the locks on for the seconds that they outlive a killed process."""
    while _held:
        _held.pop().close()


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def locked(folder: Path, name: str = LOCK) -> Iterator[bool]:
    """Hold a folder for this process; the system lets go when the process ends, however it ends.

    Args:
        folder: Made if it is not there.
        name: Of the file in it that is locked; it stays.

    Yields:
        Whether it is held. Some network file systems have no locks: then nothing is, and a warning says so.

    Raises:
        BlockingIOError: If another process holds it; names process and host.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("a+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                f"{folder} is being worked on by process {_read(file)}: wait for it, or stop it first"
            ) from error
        except OSError as error:
            log.warning(
                "%s can't be locked (%s): make sure that nothing else works on it", folder, error.strerror
            )
            is_held = False
        else:
            is_held = True
            with suppress(OSError):  # a full disk: the lock holds without its holder's name
                file.truncate(0)
                file.write(f"{os.getpid()} on {socket.gethostname()}\n".encode())
            _held.add(file)
        try:
            yield is_held
        finally:
            _held.discard(file)


def holder(folder: Path, name: str = LOCK) -> str | None:
    """Process and host that hold a folder; none if nobody does, or nobody can."""
    if not (folder / name).is_file():
        return None
    with (folder / name).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _read(file)
        except OSError:
            return None
    return None


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read(1000).decode(errors="replace").strip() or "unknown"
