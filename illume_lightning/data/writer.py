"""Writing stores: in parallel, safe against interruption, the same bytes every time.

The work is a list of parts. Everything happens in `<output>.partial`; a process killed at any instant
loses the parts it was in, and the same command does only what is missing. At the end the whole folder is
renamed to `<output>`. Names and content depend on the parts alone, so any number of workers and any
number of interruptions give the same bytes.
"""

import errno
import fcntl
import json
import logging
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from importlib.metadata import version
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np

from illume_lightning import __version__
from illume_lightning.data.part import (
    MAX_EXAMPLES,
    PARTS,
    SCRATCH_SUFFIX,
    Part,
    record_path,
    write_part,
    write_text,
)  # fmt: skip
from illume_lightning.data.store import (
    CONVERSATIONS,
    INDEX,
    MANIFEST,
    PARTIAL_SUFFIX,
    ROWS,
    SIZES,
    Chunk,
    Loss,
    Manifest,
    find_stores,
)

log = logging.getLogger(__name__)

IDENTITY = "identity.json"
LOCK = "lock"


def write_stores(
    output: str | Path,
    identity: dict[str, Any],
    parts: Callable[[], Sequence[Part]],
    *,
    splits: tuple[str, ...] = ("",),
    chunk_megabytes: int = 64,
    num_workers: int = 0,
    overwrite: bool = False,
) -> dict[str, Manifest]:
    """Write one store, or one for each split, and make the folder appear when it is complete.

    If `output` is there already and has the same identity, nothing is done. If an earlier call was
    interrupted, this one continues it.

    Args:
        output: The folder to make. With splits, the stores are its subfolders.
        identity: Inputs and options that decide the content, as JSON values.
        parts: Gives the parts; called only if there is something to do.
        splits: Names of the stores; `("",)` writes a single store at `output` itself.
        chunk_megabytes: Target size of a chunk file in MB (10^6 bytes).
        num_workers: Processes that write parts; 0 writes them in this process.
        overwrite: Replace a store, or an interrupted preparation, that has another identity.

    Returns:
        The manifest of each store, by split.

    Raises:
        ValueError: If the output holds something else, or a store would stay empty.
        RuntimeError: If another process is writing this output, or a worker was killed.
        OSError: If the disk is full; finished parts are kept.
    """
    if chunk_megabytes < 1 or num_workers < 0:
        raise ValueError(
            f"chunk_megabytes={chunk_megabytes} must be at least 1, num_workers={num_workers} at least 0"
        )
    output = Path(output)
    identity = json.loads(json.dumps({**identity, "splits": splits, "chunk_megabytes": chunk_megabytes}))
    finished = _finished(output, identity, overwrite)
    if finished:
        log.info("%s is complete already; nothing to do", output)
        return finished
    todo = parts()
    work = output.with_name(output.name + PARTIAL_SUFFIX)
    with _locked(work), _clear_disk_errors(work):
        _claim(work, identity, overwrite)
        _write_parts(work, todo, splits, chunk_megabytes * 10**6, num_workers)
        manifests = _finish(work, len(todo), splits, identity)
        if output.exists():
            os.replace(output, work / PARTS / "replaced")
        os.replace(work, output)
    shutil.rmtree(output / PARTS)
    for split, manifest in manifests.items():
        num_dropped = sum(loss.count for loss in manifest.dropped.values())
        log.info("wrote %s: %d records, %d inputs dropped", output / split, manifest.written, num_dropped)
    return manifests


def _finished(output: Path, identity: dict[str, Any], overwrite: bool) -> dict[str, Manifest] | None:
    """The manifests at `output` if they are what is asked for, None if they are to be written."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    stores = {store: Manifest.read(store / MANIFEST) for store in find_stores(output)}
    if not stores:
        raise ValueError(f"{output} exists and is not a store; choose another output")
    if (output / PARTS / IDENTITY).is_file():
        shutil.rmtree(output / PARTS)  # the last command was killed between the rename and the clean-up
    found = next(iter(stores.values())).identity
    if found == identity:
        return {split: Manifest.read(output / split / MANIFEST) for split in identity["splits"]}
    if not overwrite:
        raise ValueError(
            f"{output} was prepared from other inputs or with other options "
            f"({_difference(found, identity)}); choose another output, or pass overwrite=True to replace it"
        )
    own = {store / name for store in stores for name in (INDEX, SIZES, ROWS, MANIFEST)}
    own |= {store / chunk.filename for store, manifest in stores.items() for chunk in manifest.chunks}
    foreign = sorted(path for path in output.rglob("*") if path.is_file() and path not in own)
    if foreign:
        raise ValueError(f"{foreign[0]} is not part of the store that would be replaced; move it elsewhere")
    return None


def _claim(work: Path, identity: dict[str, Any], overwrite: bool) -> None:
    """Take the working folder for this identity: empty, or with parts that are done."""
    path = work / PARTS / IDENTITY
    found = json.loads(path.read_text()) if path.is_file() else None
    has_parts = any((work / PARTS).glob("[0-9]*.json"))
    # The old identity goes last: without it, nothing here would be known as ours.
    kept = (PARTS, LOCK, IDENTITY, IDENTITY + SCRATCH_SUFFIX)
    children = [child for child in [*work.iterdir(), *(work / PARTS).iterdir()] if child.name not in kept]
    if found is None and children:
        raise ValueError(f"{children[0]} was made by no preparation; move it, or choose another output")
    if found == identity:
        log.info("continuing the interrupted preparation in %s", work)
        return
    if has_parts and not overwrite:
        raise ValueError(
            f"{work} is an interrupted preparation from other inputs or with other options "
            f"({_difference(found or {}, identity)}); "
            "choose another output, or pass overwrite=True to start again"
        )
    for child in children:
        shutil.rmtree(child) if child.is_dir() else child.unlink()
    write_text(path, json.dumps(identity, indent=2))


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The first entry in which two identities differ, for a message."""
    key = next(key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key))
    return f"{key} was {str(found.get(key))[:80]}, is now {str(wanted.get(key))[:80]}"


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Hold the working folder for this process; the system lets go when the process ends, however it ends."""
    (work / PARTS).mkdir(parents=True, exist_ok=True)
    with (work / PARTS / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(
                f"another process is writing {work}; wait for it or choose another output"
            ) from error
        yield


@contextmanager
def _clear_disk_errors(work: Path) -> Iterator[None]:
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


def _write_parts(
    work: Path, parts: Sequence[Part], splits: tuple[str, ...], chunk_bytes: int, num_workers: int
) -> None:
    """Write all parts that are not done yet, in this process or in workers, under one progress bar."""
    from tqdm import tqdm

    for leftover in (work / PARTS).glob("*" + SCRATCH_SUFFIX):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    todo = {number: part for number, part in enumerate(parts) if not record_path(work, number).is_file()}
    total = sum(part.num_items for part in parts)
    done = total - sum(part.num_items for part in todo.values())
    with tqdm(total=total, initial=done, unit="input", desc=work.stem, disable=None) as progress:
        if num_workers == 0:
            for number, part in todo.items():
                write_part(work, number, part, splits, chunk_bytes)
                progress.update(part.num_items)
            return
        # Spawned, not forked: a fork copies the locks of threads that it does not copy.
        pool = ProcessPoolExecutor(num_workers, get_context("spawn"), initializer=end_with_parent)
        try:
            futures = {
                pool.submit(write_part, work, number, part, splits, chunk_bytes): part
                for number, part in todo.items()
            }
            for future in as_completed(futures):
                future.result()
                progress.update(futures[future].num_items)
        except BrokenProcessPool as error:
            message = "a worker was killed, most likely for memory; run the same command with fewer workers"
            raise RuntimeError(message) from error
        finally:
            pool.shutdown(cancel_futures=True)


def end_with_parent() -> None:
    """End this worker when the main process is killed; otherwise it would write on, then wait for ever."""
    parent = parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def watch() -> None:
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _finish(
    work: Path, num_parts: int, splits: tuple[str, ...], identity: dict[str, Any]
) -> dict[str, Manifest]:
    """Join the parts' records into the index, sizes and manifest of each store."""
    records = [json.loads(record_path(work, number).read_text()) for number in range(num_parts)]
    stores = {split: [record[split] for record in records] for split in splits}
    for split, entries in stores.items():
        if not any(entry["sizes"] for entry in entries):
            dropped = ", ".join(f"{loss.count} {reason}" for reason, loss in _sum_dropped(entries).items())
            shutil.rmtree(work)
            where = f" for the split '{split}'" if split else ""
            what = "conversation" if identity.get("kind") == CONVERSATIONS else "image"
            raise ValueError(
                f"no usable {what}{where} (dropped: {dropped or 'none'}); check the inputs and options"
            )
    return {split: _finish_store(work / split, entries, identity) for split, entries in stores.items()}


def _finish_store(folder: Path, entries: list[dict[str, Any]], identity: dict[str, Any]) -> Manifest:
    """Write the files of a store that are no chunks, the manifest last."""
    sizes = np.array([size for entry in entries for size in entry["sizes"]], np.int32)
    listed = [chunk for entry in entries for chunk in entry["chunks"]]
    hashes = [chunk.pop("sha256") for chunk in listed]
    chunks = [
        Chunk(chunk["filename"], chunk["chunk_bytes"], chunk["chunk_size"], digest)
        for chunk, digest in zip(listed, hashes, strict=True)
    ]
    config, *others = [entry["config"] for entry in entries if entry["config"]]
    assert all(other == config for other in others)
    packages = {name: version(name) for name in ("litdata", "numpy", "pillow")}
    manifest = Manifest(
        written=len(sizes),
        dropped=_sum_dropped(entries),
        converted=dict(sorted(sum((Counter(entry["converted"]) for entry in entries), Counter()).items())),
        sizes=_summary(sizes),
        chunks=tuple(chunks),
        identity=identity,
        packages={"illume-lightning": __version__, **packages},
    )
    np.save(folder / SIZES, sizes)
    _save_rows(folder / ROWS, entries)
    # LitData compares "updated_at" to tell whether a cached copy is stale; a hash of the content serves, and
    # unlike a time it is the same for the same data.
    index = {"chunks": listed, "config": config, "updated_at": manifest.fingerprint}
    write_text(folder / INDEX, json.dumps(index, sort_keys=True))
    write_text(folder / MANIFEST, manifest.to_json())
    return manifest


def _save_rows(path: Path, entries: list[dict[str, Any]]) -> None:
    """Write the records' rows one after the other, with the place where each ends; nothing if there are none."""
    if not any(entry.get("rows") for entry in entries):
        return
    rows = [row for entry in entries for row in entry["rows"] or [()] * len(entry["sizes"])]
    values = np.array([value for row in rows for value in row], np.int32)
    np.savez(path, values=values, ends=np.cumsum([len(row) for row in rows], dtype=np.int64))


def _sum_dropped(entries: list[dict[str, Any]]) -> dict[str, Loss]:
    """The parts' dropped inputs together, by reason."""
    counts: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    for entry in entries:
        for reason, loss in entry["dropped"].items():
            counts[reason] += loss["count"]
            examples.setdefault(reason, []).extend(loss["examples"])
    return {reason: Loss(counts[reason], tuple(examples[reason][:MAX_EXAMPLES])) for reason in sorted(counts)}


def _summary(sizes: np.ndarray) -> dict[str, Any]:
    """Sizes (N, 2) of height and width in a few numbers; records without an image, (0, 0), do not count."""
    sizes = sizes[sizes.all(axis=1)]
    if not len(sizes):
        return {"distinct": 0, "most_common": []}
    heights, widths = sizes[:, 0], sizes[:, 1]
    pairs = Counter(map(tuple, sizes.tolist()))
    return {
        "height": {"min": int(heights.min()), "median": int(np.median(heights)), "max": int(heights.max())},
        "width": {"min": int(widths.min()), "median": int(np.median(widths)), "max": int(widths.max())},
        "distinct": len(pairs),
        "most_common": [{"height": h, "width": w, "count": n} for (h, w), n in pairs.most_common(10)],
    }
