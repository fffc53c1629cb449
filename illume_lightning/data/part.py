"""Parts: the pieces of a preparation, each read and written by one process.

A part yields samples; `write_part` turns them into chunk files with final names and then renames the
part's record into place. Before that rename nothing of the part counts, after it everything does.
"""

import json
import os
import shutil
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from illume_lightning.data.store import INDEX, record_check, sha256

PARTS = "parts"
SCRATCH_SUFFIX = ".writing"
MAX_EXAMPLES = 20


class Sample(NamedTuple):
    """One record to write: a name for messages, the record's fields, and the image's size in pixels.

    `converted` names what was changed in the image; `split` is the store it goes to ("" for the only one);
    `row` are integers to be known without reading the record, as many as it needs (`rows.npz`).
    """

    name: str
    image: bytes
    caption: str
    meta: str
    height: int
    width: int
    converted: tuple[str, ...] = ()
    split: str = ""
    row: tuple[int, ...] = ()


class Lost(NamedTuple):
    """One input that is left out, and why."""

    name: str
    reason: str
    split: str = ""


class Part(Protocol):
    """A piece of work for one process; picklable, and yielding the same samples whenever it is read."""

    @property
    def num_items(self) -> int:
        """Number of inputs."""
        ...

    def read(self) -> Iterator[Sample | Lost]:
        """The samples in order, one for each input."""
        ...


@dataclass
class _Tally:
    """What one part adds to one store."""

    sizes: list[tuple[int, int]] = field(default_factory=list)
    rows: list[tuple[int, ...]] = field(default_factory=list)
    checks: list[int] = field(default_factory=list)
    converted: Counter[str] = field(default_factory=Counter)
    dropped: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


def record_path(work: Path, number: int) -> Path:
    """The file that marks a part as done."""
    return work / PARTS / f"{number:06d}.json"


def write_part(work: Path, number: int, part: Part, splits: tuple[str, ...], chunk_bytes: int) -> None:
    """Write one part's chunks and, last, its record.

    A record is a tuple of bytes: image, caption, meta. Dicts are not used, because LitData stores dicts of
    bytes and text as Arrow batches if pyarrow is there, and then copies 256 records to read one. Text is
    not used, because LitData stores the content of a file in place of a text that happens to be its path.

    Args:
        work: The working folder; the stores grow in it, under the names of their splits.
        number: Position of the part, which decides the names of its chunks.
        part: What to write.
        splits: Names of the stores.
        chunk_bytes: Target size of a chunk file in bytes.
    """
    from litdata.streaming.writer import BinaryWriter

    scratch = work / PARTS / f"{number:06d}{SCRATCH_SUFFIX}"
    folders = {split: scratch / f"split-{split}" for split in splits}
    tallies = {split: _Tally() for split in splits}
    try:
        writers = {split: BinaryWriter(str(folders[split]), chunk_bytes=chunk_bytes) for split in splits}
        with warnings.catch_warnings():
            # An image larger than a chunk gets a chunk of its own, which is fine.
            warnings.filterwarnings("ignore", "An item was larger than the target chunk size")
            for item in part.read():
                tally = tallies[item.split]
                if isinstance(item, Lost):
                    tally.dropped[item.reason].append(item.name)
                    continue
                fields = item.image, item.caption.encode(), item.meta.encode("utf-8", "replace")
                writers[item.split].add_item(len(tally.sizes), fields)
                tally.checks.append(record_check(*fields))
                tally.sizes.append((item.height, item.width))
                tally.rows.append(item.row)
                tally.converted.update(item.converted)
            for writer in writers.values():
                writer.done()
        stores = {
            split: _entry(tallies[split], *_place_chunks(folders[split], work / split, number))
            for split in splits
        }
        write_text(record_path(work, number), json.dumps(stores))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there in full or not at all, even after a power cut."""
    scratch = path.with_name(path.name + SCRATCH_SUFFIX)
    with scratch.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def _entry(tally: _Tally, chunks: list[dict[str, Any]], config: dict[str, Any] | None) -> dict[str, Any]:
    """What the part's record says of one store."""
    dropped = {
        reason: {"count": len(names), "examples": names[:MAX_EXAMPLES]}
        for reason, names in tally.dropped.items()
    }
    return {
        "chunks": chunks,
        "config": config,
        "sizes": tally.sizes,
        "rows": tally.rows if any(tally.rows) else [],
        "checks": tally.checks,
        "converted": tally.converted,
        "dropped": dropped,
    }


def _place_chunks(
    scratch: Path, folder: Path, number: int
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Give a part's chunks their final names.

    Returns:
        LitData's entries for the chunks, with a sha256 each, and LitData's config; None if there are none.
    """
    indexes = list(scratch.glob(f"*.{INDEX}"))  # LitData puts the process's rank in front
    if not indexes:  # nothing of this part is in this split
        return [], None
    content = json.loads(indexes[0].read_text())
    folder.mkdir(exist_ok=True)
    for position, chunk in enumerate(content["chunks"]):
        source = scratch / chunk["filename"]
        chunk["filename"] = f"chunk-{number:06d}-{position:03d}.bin"
        chunk["sha256"] = sha256(source)
        with source.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(source, folder / chunk["filename"])
    return content["chunks"], content["config"]
