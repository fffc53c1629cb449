"""Preparing a user's own conversations: annotation files or captioned images to a store."""

import logging
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

from illume_lightning.data.conversation_source import (
    CHAT_KEYS,
    EDIT_KEYS,
    IMAGE_KEYS,
    AnnotationPart,
    AnnotationReader,
    CaptionPart,
    CaptionTask,
    EditColumns,
    Unusable,
    loads,
)
from illume_lightning.data.image import MAX_PIXELS, Limits
from illume_lightning.data.input_file import InputFile, fingerprint
from illume_lightning.data.json_file import JsonRecords, scan_json
from illume_lightning.data.parquet_file import scan_parquet
from illume_lightning.data.part import Lost, Part
from illume_lightning.data.source import Rules, find_inputs, make_parts
from illume_lightning.data.store import CONVERSATIONS, Manifest
from illume_lightning.data.text_tokenizer import TextTokenizer
from illume_lightning.data.writer import write_stores

log = logging.getLogger(__name__)

AnnotationFormat = Literal["chat", "edit"]

_JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
_UNPRINTED = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")  # in names of files; some end a line
_LOOK_AT = 1000  # records, to tell what a file holds


def prepare_conversations(
    sources: list[str],
    output: str | Path,
    *,
    tokenizer: str,
    format: AnnotationFormat | None = None,
    captions: CaptionTask | None = None,
    image_root: str | None = None,
    holdout: float = 0.0,
    min_side: int = 16,
    max_side: int | None = None,
    max_pixels: int = MAX_PIXELS,
    follow_links: bool = False,
    source_column: str | None = None,
    target_column: str | None = None,
    instruction_column: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    report: str | None = None,
    chunk_megabytes: int = 64,
    part_items: int = 4096,
    num_workers: int = 0,
    overwrite: bool = False,
) -> dict[str, Manifest]:
    """Write conversations and their images into a store.

    Annotation files are JSON, JSON Lines or parquet, and hold conversations in the schema of LLaVA, ShareGPT
    or OpenAI, or edits: a source image, a target image and an instruction. An image in a turn of the
    assistant is one to generate. Records that break a rule are dropped, counted and named in
    `manifest.json`. The command can be killed and given again: it continues. Given again after it is
    finished, it does nothing, as long as the annotation files are the same; image files that they name are
    not compared.

    Args:
        sources: Annotation files; with `captions`, what `illume prepare images` takes.
        output: The folder to make.
        tokenizer: Folder of the text tokenizer, with `tokenizer.json`; decides lengths.
        format: "chat" for conversations, "edit" for edits; default: what the first records look like.
        captions: Make conversations of captioned images: "understand" asks for the caption, "generate" for
            the image.
        image_root: Folder that names of image files are relative to, and that they may not leave; default: the
            annotation file's.
        holdout: Share of the records, 0 to below 1, that goes to `<output>/val`, the rest going to
            `<output>/train`; 0 writes one store at `output`. The choice is by a hash of the first image, or
            of the text where there is none.
        min_side: Records with an image whose shorter side is below this many pixels are dropped.
        max_side: Images with a longer side above this many pixels are stored smaller; default: as they are.
        max_pixels: Records with an image of more pixels are dropped before it is decoded.
        follow_links: Read links that lead out of a folder; by default their records are dropped.
        source_column: Name of the source image in edits; default: a usual one.
        target_column: Name of the target image in edits; default: a usual one.
        instruction_column: Name of the instruction in edits; default: a usual one.
        image_column: With `captions`, column of parquet files with the images, as in `prepare images`.
        caption_column: With `captions`, column of parquet files with the captions, as in `prepare images`.
        report: Write no store, but check every record and list all that would be dropped in this file: a line
            each, with the place, a tab and the reason.
        chunk_megabytes: Size of a chunk file in MB.
        part_items: Records that are finished together; a kill loses at most these, for each worker.
        num_workers: Processes; 0 works in this one. The result does not depend on it.
        overwrite: Replace a store that was made from other inputs or with other options.

    Returns:
        The manifest of each store, by split: "" or "train" and "val"; none with `report`.

    Raises:
        FileNotFoundError: If there is no text tokenizer.
        ValueError: If an option is out of range, a source is damaged or holds something else, or `output` does.
        RuntimeError: If another process is writing `output`.
        OSError: If the disk is full; finished parts are kept.
    """
    if part_items < 1:
        raise ValueError(f"part_items is {part_items}; it must be at least 1")
    rules = Rules(Limits(min_side, max_side, max_pixels), holdout, follow_links)
    text_tokenizer = TextTokenizer(tokenizer)
    edits = {
        "source_column": source_column, "target_column": target_column, "instruction_column": instruction_column,
    }  # fmt: skip
    columns = EditColumns(*edits.values())
    identity = {
        "kind": CONVERSATIONS, "text_tokenizer": text_tokenizer.fingerprint, "part_items": part_items,
        "holdout": holdout, **asdict(rules.limits), "captions": captions,
    }  # fmt: skip
    if follow_links:  # stores of versions without this option stay known
        identity["follow_links"] = True
    if captions is None:
        _refuse("--captions", image_column=image_column, caption_column=caption_column)
        if format == "chat":
            _refuse("--format edit", **edits)
        files = _annotation_files(sources)
        identity |= {
            "sources": [file.name for file in files], "inputs": fingerprint(files), "format": format,
            "columns": columns, "image_root": image_root,
        }  # fmt: skip
    else:
        _refuse("annotation files", format=format, image_root=image_root, **edits)
        inputs = find_inputs(sources)
        identity |= {
            "sources": [Path(source).resolve().name for source in sources], "inputs": inputs.fingerprint,
            "image_column": image_column, "caption_column": caption_column,
        }  # fmt: skip

    def parts() -> list[Part]:
        if captions is not None:
            images = make_parts(inputs, rules, part_items, image_column, caption_column)
            return [CaptionPart(part, captions, text_tokenizer) for part in images]
        found: list[Part] = []
        for file in files:
            root = file.path.parent if image_root is None else Path(image_root)
            reader = AnnotationReader(rules, text_tokenizer, root)
            found += _annotation_parts(file, reader, format, columns, part_items)
        return found

    if report is not None:
        _write_report(parts(), Path(report), num_workers)
        return {}
    return write_stores(
        output,
        identity,
        parts,
        splits=("train", "val") if holdout else ("",),
        chunk_megabytes=chunk_megabytes,
        num_workers=num_workers,
        overwrite=overwrite,
    )


def _annotation_files(sources: Sequence[str]) -> list[InputFile]:
    """The files, with names that tell them apart."""
    paths = [Path(source) for source in sources]
    for path in paths:
        if path.is_dir():
            raise ValueError(
                f"{path} is a folder; name its annotation files ({path}/*.jsonl), or pass --captions understand "
                "or generate for a folder of pictures with captions"
            )
        if not path.is_file():
            raise ValueError(f"the source {path} does not exist; name a file on this machine")
        if path.suffix.lower() not in (*_JSON_SUFFIXES, ".parquet"):
            raise ValueError(
                f"{path} is no annotation file; these end in {', '.join(_JSON_SUFFIXES)} or .parquet (unpack others)"
            )
    names = [path.name for path in paths]
    return [
        InputFile(
            path.name if names.count(path.name) == 1 else f"{path.resolve().parent.name}/{path.name}", path
        )
        for path in paths
    ]


def _refuse(user: str, **options: str | None) -> None:
    """Complain of options that only another way to prepare would use."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name} is '{value}', which only {user} would use; leave it out")


def _annotation_parts(
    file: InputFile,
    reader: AnnotationReader,
    format: AnnotationFormat | None,
    columns: EditColumns,
    part_items: int,
) -> list[Part]:
    """Find out what a file holds, and cut it into parts."""
    if file.path.suffix.lower() == ".parquet":
        schema, stretches = scan_parquet(file, part_items)
        reader = replace(reader, columns=_edit_columns(file.path, [schema.names], format, columns))
        wanted = reader.columns or (*CHAT_KEYS, *IMAGE_KEYS)
        names = tuple(name for name in schema.names if name in wanted)
        return [AnnotationPart(replace(rows, columns=names), reader) for rows in stretches]
    pieces = scan_json(file, part_items)
    reader = replace(reader, columns=_edit_columns(file.path, _first_keys(pieces), format, columns))
    return [AnnotationPart(records, reader) for records in pieces]


def _edit_columns(
    path: Path, records: Iterable[Collection[str]], format: AnnotationFormat | None, columns: EditColumns
) -> EditColumns | None:
    """The columns of edits, or None for conversations, by the keys of the first records."""
    if format == "chat":
        return None
    first: Collection[str] = ()
    for keys in records:
        first = first or keys
        if format is None and not any(columns) and any(key in keys for key in CHAT_KEYS):
            return None
        found = columns.found_in(keys)
        if found is not None:
            return found
    if not first:
        raise ValueError(
            f"{path} holds no readable record among the first {_LOOK_AT}; give JSON Lines, one record in each, or "
            "a JSON array of records"
        )
    usual = "; ".join(", ".join(names) for names in EDIT_KEYS)
    raise ValueError(
        f"{path} holds neither conversations ({' or '.join(CHAT_KEYS)}) nor edits (usual names of source, target "
        f"and instruction: {usual}); its first record has {sorted(first)[:20]}. Name the columns with "
        "source_column, target_column and instruction_column, or set format"
    )


def _first_keys(pieces: Sequence[JsonRecords]) -> Iterator[Collection[str]]:
    """The keys of the readable ones among the first records."""
    contents = chain.from_iterable(records.read() for records in pieces)
    for _, content in islice(contents, _LOOK_AT):
        try:
            record = loads(content)
        except Unusable:
            continue
        if isinstance(record, dict):
            yield record.keys()


def _write_report(parts: Sequence[Part], path: Path, num_workers: int) -> None:
    """List all that would be dropped, in the order of the records."""
    if num_workers:
        with ProcessPoolExecutor(num_workers, get_context("spawn")) as pool:
            found = list(pool.map(_lost, parts))
    else:
        found = [_lost(part) for part in parts]
    lost = [item for items in found for item in items]
    text = "".join(f"{_UNPRINTED.sub(_escaped, item.name)}\t{item.reason}\n" for item in lost)
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
    log.info("%d of %d records cannot be used; %s", len(lost), sum(part.num_items for part in parts), path)


def _escaped(match: re.Match[str]) -> str:
    return ascii(match[0])[1:-1]


def _lost(part: Part) -> list[Lost]:
    return [item for item in part.read() if isinstance(item, Lost)]
