"""Writing stores: in parallel, safe against interruption, the same bytes every time.

The work is a list of parts. Everything happens in `<output>.partial`; a process killed at any instant
loses the parts it was in, and the same command does only what is missing. At the end the whole folder is
renamed to `<output>`. Names and content depend on the parts alone, so any number of workers, shards and
interruptions give the same bytes. Shards are jobs that write some of the parts each into one working folder;
`merge_shards` does what is left at the end.
"""

import json
import logging
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from importlib.metadata import version
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np

from illume_lightning import __version__
from illume_lightning.data.manifest import MANIFEST, Chunk, Loss, Manifest
from illume_lightning.data.part import (
    MAX_EXAMPLES,
    PARTS,
    SCRATCH_SUFFIX,
    Part,
    record_path,
    write_part,
    write_text,
)  # fmt: skip
from illume_lightning.data.shard import current_shard
from illume_lightning.data.store import (
    CHECKS,
    CONVERSATIONS,
    INDEX,
    PARTIAL_SUFFIX,
    ROWS,
    SIZES,
    find_stores,
    sha256,
)
from illume_lightning.data.working_folder import DIVISION, IDENTITY, difference, divide, working_folder

log = logging.getLogger(__name__)


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
    interrupted, this one continues it. Within `shard.divided`, only one shard's parts are written.

    Args:
        output: The folder to make. With splits, the stores are its subfolders.
        identity: Inputs and options that decide the content, as JSON values.
        parts: Gives the parts; called only if there is something to do.
        splits: Names of the stores; `("",)` writes a single store at `output` itself.
        chunk_megabytes: Target size of a chunk file in MB (10^6 bytes).
        num_workers: Processes that write parts; 0 writes them in this process.
        overwrite: Replace a store, or an interrupted preparation, that has another identity.

    Returns:
        The manifest of each store, by split; none for a shard, unless all is complete already.

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
    shard = current_shard()
    finished = _finished(output, identity, overwrite)
    if finished:
        log.info("%s is complete already; nothing to do", output)
        return finished
    todo = parts()
    work = output.with_name(output.name + PARTIAL_SUFFIX)
    with working_folder(work, identity, overwrite=overwrite, shard=shard) as is_continued:
        if shard is None and is_continued:
            log.info("continuing the interrupted preparation in %s", work)
        if shard is not None:
            divide(work, shard, len(todo), _packages())
        mine = {number: part for number, part in enumerate(todo) if shard is None or shard.has(number)}
        _write_parts(work, mine, splits, chunk_megabytes * 10**6, num_workers)
        if shard is not None:
            log.info(
                "shard %s of %s is finished, with %d of %d parts; when all shards are, run `illume prepare merge %s`",
                *(shard, output, len(mine), len(todo), output),
            )
            return {}
        return _complete(work, output, len(todo), identity)


def merge_shards(output: str | Path, *, overwrite: bool = False) -> dict[str, Manifest]:
    """Join what the shards of a preparation wrote; the result is what one job would have written, byte for byte.

    Args:
        output: The folder that the shards were given.
        overwrite: Replace a store that was made from other inputs or with other options.

    Returns:
        The manifest of each store, by its folder's name below `output`.

    Raises:
        FileNotFoundError: If there are no shards.
        ValueError: If shards are missing, named in the message, or `output` holds something else.
        RuntimeError: If shards are still at work.
    """
    output = Path(output)
    below = sorted(output.rglob("*" + PARTIAL_SUFFIX)) if output.is_dir() else []
    works = [work for work in (output.with_name(output.name + PARTIAL_SUFFIX), *below) if work.is_dir()]
    if not works and not any(output.rglob(MANIFEST)):
        raise FileNotFoundError(
            f"there are no shards of {output}; write them with `illume prepare ... {output} --shard 0/8` and so on"
        )
    if not works:
        log.info("%s is complete already; nothing to do", output)
        for leftover in output.rglob(f"{PARTS}/{IDENTITY}"):
            shutil.rmtree(leftover.parent)  # of a merge that was killed between the rename and the clean-up
    for work in works:  # of several stores none is joined where one is not finished
        _check_division(work)
    manifests: dict[str, Manifest] = {}
    for work in works:
        target = work.with_name(work.name.removesuffix(PARTIAL_SUFFIX))
        identity = json.loads((work / PARTS / IDENTITY).read_text())
        with working_folder(work, identity, overwrite=False, shard=None):
            num_parts = _check_division(work)
            finished = _finished(target, identity, overwrite)
            made = finished or _complete(work, target, num_parts, identity)
        folders = () if target == output else target.relative_to(output).parts
        manifests |= {"/".join(filter(None, (*folders, split))): made[split] for split in made}
    return manifests


def _check_division(work: Path) -> int:
    """Number of parts of a preparation that shards have finished."""
    path = work / PARTS / DIVISION
    if not path.is_file():
        raise ValueError(f"{work} was not begun by shards; run the command that began it again to finish it")
    division = json.loads(path.read_text())
    count, num_parts = division["number of shards"], division["number of parts"]
    missing = [number for number in range(num_parts) if not record_path(work, number).is_file()]
    if missing:
        shards = Counter(number % count for number in missing)
        names = ", ".join(f"{index}/{count} ({shards[index]} parts)" for index in sorted(shards))
        raise ValueError(f"{work} lacks what these shards write: {names}; run them, then merge again")
    return num_parts


def _complete(work: Path, output: Path, num_parts: int, identity: dict[str, Any]) -> dict[str, Manifest]:
    """Make stores of a working folder whose parts are all done, and put them in place."""
    manifests = _finish(work, num_parts, tuple(identity["splits"]), identity)
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
            f"({difference(found, identity)}); choose another output, or pass overwrite=True to replace it"
        )
    own = {store / name for store in stores for name in (INDEX, SIZES, ROWS, CHECKS, MANIFEST)}
    own |= {store / chunk.filename for store, manifest in stores.items() for chunk in manifest.chunks}
    foreign = sorted(path for path in output.rglob("*") if path.is_file() and path not in own)
    if foreign:
        raise ValueError(f"{foreign[0]} is not part of the store that would be replaced; move it elsewhere")
    return None


def _write_parts(
    work: Path, parts: Mapping[int, Part], splits: tuple[str, ...], chunk_bytes: int, num_workers: int
) -> None:
    """Write all parts that are not done yet, in this process or in workers, under one progress bar."""
    from tqdm import tqdm

    for leftover in (work / PARTS).glob("[0-9]*" + SCRATCH_SUFFIX):
        if int(leftover.name.split(".")[0]) in parts:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    todo = {number: part for number, part in parts.items() if not record_path(work, number).is_file()}
    total = sum(part.num_items for part in parts.values())
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
    manifest = Manifest(
        written=len(sizes),
        dropped=_sum_dropped(entries),
        converted=dict(sorted(sum((Counter(entry["converted"]) for entry in entries), Counter()).items())),
        sizes=_summary(sizes),
        chunks=tuple(chunks),
        identity=identity,
        packages=_packages(),
    )
    np.save(folder / SIZES, sizes)
    _save_rows(folder / ROWS, entries)
    checks = [check for entry in entries for check in entry.get("checks", [])]
    if len(checks) == len(sizes):  # not where an older version wrote some of the parts
        np.save(folder / CHECKS, np.array(checks, np.uint32))
    # LitData compares "updated_at" to tell whether a cached copy is stale; a hash of the content serves, and
    # unlike a time it is the same for the same data.
    index = {"chunks": listed, "config": config, "updated_at": manifest.fingerprint}
    write_text(folder / INDEX, json.dumps(index, sort_keys=True))
    beside = [name for name in (CHECKS, INDEX, ROWS, SIZES) if (folder / name).is_file()]
    manifest = replace(manifest, files={name: sha256(folder / name) for name in beside})
    write_text(folder / MANIFEST, manifest.to_json())
    return manifest


def _packages() -> dict[str, str]:
    """Versions of what decides the bytes of stores."""
    return {"illume-lightning": __version__} | {
        name: version(name) for name in ("litdata", "numpy", "pillow")
    }


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
