"""Where images come from: folders, webdataset tars and parquet files, as parts of equal size.

Listing touches names and headers only; the images are read by the parts, wherever these run.
"""

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from illume_lightning.data.image import SUFFIXES, Dropped, Limits, canonical
from illume_lightning.data.input_file import InputFile, fingerprint
from illume_lightning.data.parquet_file import ParquetRows, scan_parquet
from illume_lightning.data.part import Lost, Part, Sample
from illume_lightning.data.safe_file import (
    MAX_BYTES,
    MAX_TEXT_BYTES,
    NOT_A_FILE,
    TOO_LARGE,
    RefusedFile,
    read_file,
)

SURROGATE = re.compile("[\ud800-\udfff]")
"""What JSON can write and UTF-8 cannot."""

_CAPTION_NAMES = ("text", "caption")


class NotUnicode(Exception):
    """A text that could not be stored as it is."""

    def __init__(self) -> None:
        super().__init__("text is not Unicode")


@dataclass(frozen=True)
class Rules:
    """How an image becomes a sample.

    Args:
        limits: Which images are kept, and at which size.
        holdout: Share of the images that goes to the split "val", the rest going to "train"; with 0 there
            are no splits.
        follow_links: Read links that lead out of the folder too.

    Raises:
        ValueError: If `holdout` is out of range.
    """

    limits: Limits
    holdout: float
    follow_links: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.holdout < 1:
            raise ValueError(f"holdout is {self.holdout}; it is a share of the images, from 0 to below 1")

    def split(self, data: bytes) -> str:
        """The split of an image, by a hash of its bytes: the same file is never in both."""
        if not self.holdout:
            return ""
        number = int.from_bytes(hashlib.sha256(data).digest()[:8], "big")
        return "val" if number < self.holdout * 2**64 else "train"

    def sample(self, name: str, data: bytes, caption: str, meta: str = "{}") -> Sample | Lost:
        """Make the image canonical and complete the sample."""
        split = self.split(data)
        image = canonical(data, self.limits)
        if isinstance(image, Dropped):
            return Lost(name, image.reason, split)
        return Sample(name, image.data, caption, meta, image.height, image.width, image.converted, split)

    def lost(self, name: str, reason: str) -> Lost:
        """An input whose image cannot even be read."""
        return Lost(name, reason, "train" if self.holdout else "")


@dataclass(frozen=True)
class Inputs:
    """The files of all sources, sorted, by kind; and a hash of their names, sizes and times of change."""

    images: tuple[InputFile, ...]
    tars: tuple[InputFile, ...]
    parquets: tuple[InputFile, ...]
    fingerprint: str


def find_inputs(sources: Sequence[str]) -> Inputs:
    """List the files of some sources.

    Args:
        sources: Folders, which are searched through, and files: images, `.tar`, `.parquet`.

    Raises:
        ValueError: If a source is missing or holds nothing of use.
    """
    found: dict[str, list[InputFile]] = {"image": [], "tar": [], "parquet": []}
    known: list[InputFile] = []
    for source in sources:
        root = Path(source)
        if not root.exists():
            raise ValueError(f"the source {source} does not exist; name a folder or a file on this machine")
        files = list(_walk(root)) if root.is_dir() else [InputFile(root.name, root)]
        count = 0
        for file in sorted(files, key=lambda file: file.name):
            kind = _kind(file.path)
            if kind in found:
                found[kind].append(file)
                count += 1
            if kind:
                known.append(file)
        if not count:
            raise ValueError(
                f"the source {source} has no images, .tar or .parquet files; "
                f"image files end in {', '.join(sorted(SUFFIXES))}"
            )
    return Inputs(tuple(found["image"]), tuple(found["tar"]), tuple(found["parquet"]), fingerprint(known))


def make_parts(
    inputs: Inputs, rules: Rules, part_items: int, image_column: str | None, caption_column: str | None
) -> list[Part]:
    """Cut the inputs into parts.

    Args:
        inputs: The files.
        rules: How an image becomes a sample.
        part_items: Inputs in a part; parquet files are cut only between row groups.
        image_column: Column of parquet files with the images; None finds it.
        caption_column: Column of parquet files with the captions; None takes "text" or "caption" if there.

    Raises:
        ValueError: If `part_items` is not positive, or a tar or parquet file is damaged or has no column of
            the name or type.
        ModuleNotFoundError: If there are parquet files and pyarrow is not installed.
    """
    if part_items < 1:
        raise ValueError(f"part_items is {part_items}; it must be at least 1")
    starts = range(0, len(inputs.images), part_items)
    parts: list[Part] = [FolderPart(inputs.images[start : start + part_items], rules) for start in starts]
    for file in inputs.tars:
        parts += _tar_parts(file, rules, part_items)
    for file in inputs.parquets:
        parts += _parquet_parts(file, rules, part_items, image_column, caption_column)
    return parts


@dataclass(frozen=True)
class FolderPart:
    """Image files; the caption of `a.jpg` is the text of `a.txt` beside it, if there."""

    files: tuple[InputFile, ...]
    rules: Rules

    @property
    def num_items(self) -> int:
        """Number of files."""
        return len(self.files)

    def read(self) -> Iterator[Sample | Lost]:
        """Read the files."""
        for file in self.files:
            try:
                yield self._read(file)
            except (RefusedFile, NotUnicode) as refused:
                yield self.rules.lost(file.name, str(refused))

    def _read(self, file: InputFile) -> Sample | Lost:
        links = self.rules.follow_links
        data = read_file(file.path, file.root, follow_links=links)
        sidecar = file.path.with_suffix(".txt")
        caption = ""
        if sidecar.is_file():
            caption = _text(read_file(sidecar, file.root, follow_links=links, max_bytes=MAX_TEXT_BYTES))
        return self.rules.sample(file.name, data, caption)


@dataclass(frozen=True)
class TarPart:
    """Samples of a webdataset tar, from a byte offset on; nothing is extracted to disk.

    As in webdataset, files one after the other with the same name up to the first dot are one sample:
    an image, and `.txt` or `.json` (an object with "caption" or "text") for the caption.
    """

    file: InputFile
    offset: int
    num_items: int
    rules: Rules

    def read(self) -> Iterator[Sample | Lost]:
        """Read the samples."""
        with self.file.path.open("rb") as stream:
            stream.seek(self.offset)
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                groups = _groups(archive)
                for _, (key, _, members) in zip(range(self.num_items), groups, strict=False):
                    wanted = [next((suffix for suffix in members if suffix in SUFFIXES), ""), ".txt", ".json"]
                    name = f"{self.file.name}/{key}"
                    try:
                        content = {
                            suffix: _extract(archive, members[suffix])
                            for suffix in wanted
                            if suffix in members
                        }
                        yield self._sample(name, content)
                    except (RefusedFile, NotUnicode) as refused:
                        yield self.rules.lost(name, str(refused))

    def _sample(self, name: str, content: dict[str, bytes]) -> Sample | Lost:
        image = next((data for suffix, data in content.items() if suffix in SUFFIXES), None)
        if image is None:
            return self.rules.lost(name, "no image in the sample")
        meta: dict[str, Any] = {}
        if ".json" in content:
            try:
                loaded = json.loads(content[".json"])
            except (ValueError, RecursionError):
                return Lost(name, "json not readable", self.rules.split(image))
            meta = loaded if isinstance(loaded, dict) else {}
        caption = _text(content[".txt"]) if ".txt" in content else ""
        captions = [caption, *(meta.get(key) for key in reversed(_CAPTION_NAMES))]
        caption = next((text for text in captions if isinstance(text, str) and text), "")
        if SURROGATE.search(caption):
            raise NotUnicode
        return self.rules.sample(name, image, caption, json.dumps(meta))


@dataclass(frozen=True)
class ParquetPart:
    """Rows of a parquet file."""

    rows: ParquetRows
    image_column: str
    caption_column: str | None
    rules: Rules

    @property
    def num_items(self) -> int:
        """Number of rows."""
        return self.rows.num_items

    def read(self) -> Iterator[Sample | Lost]:
        """Read the rows."""
        for name, record in self.rows.read():
            image = record[self.image_column]
            data = image["bytes"] if isinstance(image, dict) else image
            caption = record[self.caption_column] if self.caption_column else None
            if data is None:
                yield self.rules.lost(name, "no image bytes in the row")
            else:
                yield self.rules.sample(name, data, caption or "")


def _walk(root: Path) -> Iterator[InputFile]:
    """All files below a folder, but hidden ones; folders that are links are not entered."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            # Pipes, devices and links to nothing are listed where they look like images, and so counted.
            if not name.startswith(".") and (_kind(path) == "image" or path.is_file()):
                yield InputFile(f"{root.resolve().name}/{path.relative_to(root).as_posix()}", path, root)


def _kind(path: Path) -> str:
    """One of "image", "tar", "parquet", "caption"; "" for files that are not read."""
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        return "image"
    return {".tar": "tar", ".parquet": "parquet", ".txt": "caption"}.get(suffix, "")


def _text(data: bytes) -> str:
    """Caption text, without a mark of byte order in front and white space around it."""
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise NotUnicode from error


def _groups(archive: tarfile.TarFile) -> Iterator[tuple[str, int, dict[str, tarfile.TarInfo]]]:
    """The samples of a tar: key, offset of the first header, and members by lower-case suffix."""
    key, offset, members = "", 0, dict[str, tarfile.TarInfo]()
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # or the headers of the whole archive pile up in memory
        folder, _, name = member.name.rpartition("/")
        stem, _, suffix = name.partition(".")
        if member.isdir() or not stem:  # no stem: a hidden file
            continue
        if members and f"{folder}/{stem}" != key:
            yield key.removeprefix("/"), offset, members
            members = {}
        if not members:
            key, offset = f"{folder}/{stem}", member.offset
        members.setdefault(f".{suffix.lower()}", member)
    if members:
        yield key.removeprefix("/"), offset, members


def _extract(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if not member.isfile():  # a link, a pipe, a device
        raise RefusedFile(NOT_A_FILE)
    if member.size > MAX_BYTES:  # of a sparse file, the size that it would have when unpacked
        raise RefusedFile(TOO_LARGE)
    stream = archive.extractfile(member)
    assert stream is not None  # _groups gives files only
    return stream.read()


def _tar_parts(file: InputFile, rules: Rules, part_items: int) -> list[TarPart]:
    """Find the offsets at which parts begin, reading headers only."""
    starts: list[int] = []
    count = 0
    try:
        with tarfile.open(file.path, "r:") as archive:
            for _, offset, _ in _groups(archive):
                if count % part_items == 0:
                    starts.append(offset)
                count += 1
            # tarfile takes a damaged header for the end; a real end is zeros or the end of the file.
            assert archive.fileobj is not None
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"bad header at byte {archive.offset}")
    except tarfile.ReadError as error:
        raise ValueError(
            f"{file.path} is damaged or is no uncompressed tar ({error}); "
            "fetch it again, or unpack and pack it again"
        ) from error
    return [
        TarPart(file, offset, min(part_items, count - number * part_items), rules)
        for number, offset in enumerate(starts)
    ]


def _parquet_parts(
    file: InputFile, rules: Rules, part_items: int, image_column: str | None, caption_column: str | None
) -> list[ParquetPart]:
    """Find the columns, and gather row groups until they have enough rows."""
    schema, stretches = scan_parquet(file, part_items)
    image, caption = _columns(file.path, schema, image_column, caption_column)
    names = (image,) if caption is None else (image, caption)
    return [ParquetPart(replace(rows, columns=names), image, caption, rules) for rows in stretches]


def _columns(
    path: Path, schema: Any, image_column: str | None, caption_column: str | None
) -> tuple[str, str | None]:
    """The names of the image and caption columns of an Arrow schema."""
    import pyarrow
    from pyarrow import types

    def is_image(kind: Any) -> bool:
        if types.is_struct(kind):
            return bool(kind.get_field_index("bytes") >= 0)
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    images = [field.name for field in schema if is_image(field.type)]
    texts = [field.name for field in schema if field.type in (pyarrow.string(), pyarrow.large_string())]
    if image_column is None and "image" in images:
        image_column = "image"
    elif image_column is None and len(images) == 1:
        image_column = images[0]
    if image_column is None or image_column not in images:
        raise ValueError(
            f"{path} has no image column '{image_column}'; set image_column to one of {images} "
            f"(binary, or a struct with 'bytes'; all columns: {schema.names})"
        )
    if caption_column is None:
        caption_column = next((name for name in _CAPTION_NAMES if name in texts), None)
    elif caption_column not in texts:
        raise ValueError(
            f"{path} has no text column '{caption_column}'; set caption_column to one of {texts}"
        )
    return image_column, caption_column
