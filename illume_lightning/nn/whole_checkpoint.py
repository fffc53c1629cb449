"""Which checkpoints of a run are whole, and which is the newest of them."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from illume_lightning import durable_file
from illume_lightning.nn.plain_file import load_plain
from illume_lightning.nn.sharded_checkpoint import is_sharded, read_rest
from illume_lightning.nn.sharded_metadata import read_metadata

LAST = "last.ckpt"
_SUFFIX = ".ckpt"


@dataclass(frozen=True)
class Choice:
    """The checkpoint that a run goes on from.

    Args:
        checkpoint: The newest whole one; none in a folder without any.
        damaged: Newer ones, and what is wrong with each.
    """

    checkpoint: Path | None
    damaged: dict[Path, str]


def choose(folder: Path) -> Choice:
    """Find the newest checkpoint of a run that is whole. All of it is read.

    Raises:
        ValueError: If there are some and none is whole; names them all.
    """
    damaged: dict[Path, str] = {}
    for path in newest_first(folder):
        reason = damage(path)
        if not reason:
            return Choice(path, damaged)
        damaged[path] = reason
    if damaged:
        found = ", ".join(f"{path.name} ({reason})" for path, reason in damaged.items())
        raise ValueError(
            f"{folder} has no checkpoint that is whole: {found}; put a copy of one there, or move the folder away to "
            "begin anew; nothing was changed"
        )
    return Choice(None, {})


def newest_first(folder: Path) -> list[Path]:
    """Checkpoints of a run: ``last.ckpt``, and the others by the step in their names.

    A file that was written after ``last.ckpt``, of a later step, is before it: the run was killed in between.
    """
    last = folder / LAST
    others = [path for path in folder.glob("*" + _SUFFIX) if path != last]
    others.sort(key=lambda path: (_named_step(path), path.stat().st_mtime_ns), reverse=True)
    if not last.exists():
        return others
    written, step = last.stat().st_mtime_ns, global_step(last)
    newer = [
        path
        for path in others
        if path.stat().st_mtime_ns > written and _named_step(path) > (-1 if step is None else step)
    ]
    return [*newer, last, *(path for path in others if path not in newer)]


def damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, a file or FSDP2's folder; "" if it is whole as far as can be told."""
    if not checkpoint.is_dir():
        return durable_file.damage(checkpoint)
    if not is_sharded(checkpoint):
        return "the folder is no whole checkpoint of FSDP2"
    try:
        read_metadata(checkpoint)
        read_rest(checkpoint)
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return ""


def require_whole(checkpoint: str | Path) -> None:
    """Refuse a file that is not as it was written, or can't be read; without a sum only the latter is known.

    Raises:
        ValueError: names one beside it that is whole.
    """
    path = Path(checkpoint)
    try:
        _check(path)
    except ValueError as error:
        good = next(
            (other for other in newest_first(path.parent) if other != path and not damage(other)), None
        )
        if good is None:
            raise
        raise ValueError(
            f"{error}; {good} (step {global_step(good)}) beside it is whole: give that one"
        ) from error


def global_step(checkpoint: Path) -> int | None:
    """Training steps in a checkpoint; none where it can't be read."""
    try:
        content: Any = read_rest(checkpoint)
    except (ValueError, OSError):
        return None
    return content.get("global_step") if isinstance(content, dict) else None


def _check(path: Path) -> None:
    if not path.is_file() or path.suffix == ".safetensors":
        return
    if durable_file.read_sum(path) is None:
        load_plain(path)
    elif reason := durable_file.damage(path):
        raise ValueError(f"{path} is damaged: {reason}")


def _named_step(path: Path) -> int:
    found = re.search(r"step=(\d+)", path.stem)
    return int(found[1]) if found else -1
