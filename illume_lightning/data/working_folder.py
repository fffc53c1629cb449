"""The folder `<output>.partial` in which stores grow, and who may work in it."""

import errno
import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from illume_lightning.data.part import PARTS, SCRATCH_SUFFIX, write_text
from illume_lightning.data.shard import Shard

IDENTITY = "identity.json"
DIVISION = "division.json"
_LOCK = "lock"
_GATE = "gate"


@contextmanager
def working_folder(
    work: Path, identity: dict[str, Any], *, overwrite: bool, shard: Shard | None
) -> Iterator[bool]:
    """Hold a working folder that has this identity: empty, or with parts that are done.

    One process holds it for itself, or several hold it together for a shard each. The system lets go when a
    process ends, however it ends.

    Args:
        work: The folder; made if it is not there.
        identity: Inputs and options that decide the content.
        overwrite: Start again if the folder has another identity.
        shard: What of the preparation this process does; none for all of it.

    Yields:
        Whether the folder has had this identity before.

    Raises:
        RuntimeError: If another process is in the way.
        ValueError: If the folder has another identity, or holds something else.
        OSError: If the disk is full.
    """
    parts = work / PARTS
    parts.mkdir(parents=True, exist_ok=True)
    with clear_disk_errors(work), ExitStack() as held:
        lock = held.enter_context((parts / _LOCK).open("w+"))
        with (parts / _GATE).open("w+") as gate:
            # One at a time: jobs that begin together would each find the folder empty.
            fcntl.flock(gate, fcntl.LOCK_EX)
            _lock(lock, shared=shard is not None, what=f"{work}")
            is_continued = _claim(work, identity, overwrite, lock)
            if shard is not None:
                fcntl.flock(lock, fcntl.LOCK_SH)
                file = held.enter_context((parts / f"shard-{shard.index}.lock").open("w+"))
                _lock(file, shared=False, what=f"shard {shard} of {work}")
        yield is_continued


def _lock(file: IO[str], *, shared: bool, what: str) -> None:
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RuntimeError(
            f"another process is writing {what}; wait for it or choose another output"
        ) from error


def _claim(work: Path, identity: dict[str, Any], overwrite: bool, lock: IO[str]) -> bool:
    """Take the working folder for this identity; whether it has it already."""
    path = work / PARTS / IDENTITY
    found = json.loads(path.read_text()) if path.is_file() else None
    has_parts = any((work / PARTS).glob("[0-9]*.json"))
    # The old identity goes last: without it, nothing here would be known as ours.
    kept = (PARTS, _LOCK, _GATE, IDENTITY, IDENTITY + SCRATCH_SUFFIX)
    children = [child for child in [*work.iterdir(), *(work / PARTS).iterdir()] if child.name not in kept]
    if found is None and children:
        raise ValueError(f"{children[0]} was made by no preparation; move it, or choose another output")
    if found == identity:
        return True
    if has_parts and not overwrite:
        raise ValueError(
            f"{work} is an interrupted preparation from other inputs or with other options "
            f"({difference(found or {}, identity)}); "
            "choose another output, or pass overwrite=True to start again"
        )
    if found is not None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(
                f"other shards are at work in {work} with other inputs or options "
                f"({difference(found, identity)}); wait for them, or choose another output"
            ) from error
    for child in children:
        shutil.rmtree(child) if child.is_dir() else child.unlink()
    write_text(path, json.dumps(identity, indent=2))
    return False


def divide(work: Path, shard: Shard, num_parts: int, packages: dict[str, str]) -> None:
    """Note how a preparation is divided, for whoever joins its parts.

    Args:
        work: The working folder, held.
        shard: One of the jobs.
        num_parts: Parts of the whole preparation.
        packages: Versions that decide the bytes of what is written.

    Raises:
        ValueError: If the jobs before this one divided it otherwise, or wrote with other versions.
    """
    path = work / PARTS / DIVISION
    wanted = {"number of shards": shard.count, "number of parts": num_parts, **packages}
    with (work / PARTS / _GATE).open("w+") as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)
        if not path.is_file():
            write_text(path, json.dumps(wanted))
            return
    found = json.loads(path.read_text())
    if found != wanted:
        raise ValueError(
            f"{work} was begun by shards that do not fit this one ({difference(found, wanted)}); give all jobs "
            "the same, or choose another output"
        )


def difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The first entry in which two identities differ, for a message."""
    key = next(key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key))
    return f"{key} was {str(found.get(key))[:80]}, is now {str(wanted.get(key))[:80]}"


@contextmanager
def clear_disk_errors(work: Path) -> Iterator[None]:
    """Say what to do when the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        message = (
            f"no space left for {work}; finished parts are kept: free some and run the same command again"
        )
        raise OSError(error.errno, message) from error
