"""Preparing a user's own images: any folder, webdataset or parquet collection to a store."""

from dataclasses import asdict
from pathlib import Path

from illume_lightning.data.image import MAX_PIXELS, Limits
from illume_lightning.data.source import Rules, find_inputs, make_parts
from illume_lightning.data.store import Manifest
from illume_lightning.data.writer import write_stores


def prepare_images(
    sources: list[str],
    output: str | Path,
    *,
    holdout: float = 0.0,
    min_side: int = 16,
    max_side: int | None = None,
    max_pixels: int = MAX_PIXELS,
    follow_links: bool = False,
    image_column: str | None = None,
    caption_column: str | None = None,
    chunk_megabytes: int = 64,
    part_items: int = 4096,
    num_workers: int = 0,
    overwrite: bool = False,
) -> dict[str, Manifest]:
    """Write images and captions into a store.

    RGB JPEG, PNG and WebP files are stored byte for byte; other pictures become PNG. What cannot be used
    is dropped, counted and named in `manifest.json`. The command can be killed and given again: it
    continues. Given again after it is finished, it does nothing.

    Args:
        sources: Folders (searched through), webdataset `.tar` files, parquet files, single images. In
            folders, the caption of `a.jpg` is the text of `a.txt`.
        output: The folder to make.
        holdout: Share of the images, 0 to below 1, that goes to `<output>/val`, the rest going to
            `<output>/train`; 0 writes one store at `output`. The choice is by a hash of the file's bytes.
        min_side: Images with a shorter side below this many pixels are dropped.
        max_side: Images with a longer side above this many pixels are stored smaller; default: as they are.
        max_pixels: Images with more pixels are dropped before they are decoded; one of the default's size takes
            0.7 GB while it is.
        follow_links: Read links that lead out of a folder; by default they are dropped, as are hard links, pipes
            and devices in archives.
        image_column: Column of parquet files with the images; default: the one of a fitting type.
        caption_column: Column of parquet files with the captions; default: "text" or "caption", if there.
        chunk_megabytes: Size of a chunk file in MB.
        part_items: Images that are finished together; a kill loses at most these, for each worker.
        num_workers: Processes; 0 works in this one. The result does not depend on it.
        overwrite: Replace a store that was made from other inputs or with other options.

    Returns:
        The manifest of each store, by split: "" or "train" and "val".

    Raises:
        ValueError: If an option is out of range, a source has no images, or `output` holds something else.
        RuntimeError: If another process is writing `output`.
        OSError: If the disk is full; finished parts are kept.
    """
    rules = Rules(Limits(min_side, max_side, max_pixels), holdout, follow_links)
    inputs = find_inputs(sources)
    names = [Path(source).resolve().name for source in sources]
    identity = {
        "kind": "images", "sources": names, "inputs": inputs.fingerprint, "part_items": part_items,
        "holdout": holdout, **asdict(rules.limits),
        "image_column": image_column, "caption_column": caption_column,
    }  # fmt: skip
    if follow_links:  # stores of versions without this option stay known
        identity["follow_links"] = True
    return write_stores(
        output,
        identity,
        lambda: make_parts(inputs, rules, part_items, image_column, caption_column),
        splits=("train", "val") if holdout else ("",),
        chunk_megabytes=chunk_megabytes,
        num_workers=num_workers,
        overwrite=overwrite,
    )
