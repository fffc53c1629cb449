"""What a store says of itself: `manifest.json`, written last, and refused where it cannot be true."""

import hashlib
import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1
MANIFEST = "manifest.json"

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")  # of a file in the store's own folder
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST_RECORDS = 2**31 - 1
_MOST_BYTES = 2**50


@dataclass(frozen=True)
class Chunk:
    """One chunk file: its name, size in bytes, number of records, and sha256 as hexadecimal digits."""

    filename: str
    num_bytes: int
    num_items: int
    sha256: str


@dataclass(frozen=True)
class Loss:
    """How many inputs were dropped for one reason, and the names of the first of them."""

    count: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """What a store holds and where it came from.

    Args:
        written: Number of records N.
        dropped: Inputs left out, by reason.
        converted: Number of images that were changed and encoded again, by kind of change.
        sizes: Summary of heights and widths in pixels.
        chunks: The chunk files in reading order.
        identity: Inputs and options that decide the content; equal identities give equal stores.
        packages: Versions of the packages that wrote the store.
        files: sha256 of the files beside the chunks, by name; empty for stores of older versions.
    """

    written: int
    dropped: dict[str, Loss]
    converted: dict[str, int]
    sizes: dict[str, Any]
    chunks: tuple[Chunk, ...]
    identity: dict[str, Any]
    packages: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Hash of the content: equal for equal records in equal order (sha256, hexadecimal)."""
        return hashlib.sha256("\n".join(chunk.sha256 for chunk in self.chunks).encode()).hexdigest()

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        return json.dumps({"version": FORMAT_VERSION, **asdict(self)}, indent=2) + "\n"

    @staticmethod
    def read(path: Path) -> "Manifest":
        """Read a `manifest.json`.

        Raises:
            ValueError: If it is no manifest, of an unknown version, or says what cannot be true: a value of a
                wrong type, out of range, a file outside the store's folder, chunks that do not add up.
        """
        try:
            content = json.loads(path.read_bytes())
            version = content.pop("version")
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} is not the manifest of a store; prepare the data again") from error
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format version {_short(version)}, this code reads {FORMAT_VERSION}; prepare the data again"
            )
        try:
            return _manifest(content)
        except _Lie as lie:
            raise ValueError(
                f"{path} cannot be true: {lie}; copy the file again or prepare the data again"
            ) from lie


class _Lie(Exception):
    """What a manifest says that cannot be so."""


def _manifest(content: dict[str, Any]) -> Manifest:
    """The manifest of a JSON object."""
    known = Manifest.__dataclass_fields__
    unknown = sorted(name for name in content if name not in known)
    if unknown:
        raise _Lie(f"it has an entry {unknown[0]!r}, which this version does not know")
    chunks = tuple(_chunk(number, entry) for number, entry in enumerate(_list(content, "chunks")))
    manifest = Manifest(
        written=_count(content.get("written"), "written", _MOST_RECORDS),
        dropped={reason: _loss(reason, loss) for reason, loss in _mapping(content, "dropped").items()},
        converted={
            name: _count(count, f"converted[{name!r}]", _MOST_RECORDS)
            for name, count in _mapping(content, "converted").items()
        },
        sizes=_mapping(content, "sizes"),
        chunks=chunks,
        identity=_mapping(content, "identity"),
        packages=_mapping(content, "packages"),
        files={name: _hash(digest, name) for name, digest in _mapping(content, "files").items()},
    )
    for name in (*manifest.files, *(chunk.filename for chunk in chunks)):
        if not _NAME.fullmatch(name):
            raise _Lie(f"the file name {name!r} is not that of a file in the store's folder")
    for name, times in Counter(chunk.filename for chunk in chunks).items():
        if times > 1:
            raise _Lie(f"the chunk {name} is listed {times} times")
    total = sum(chunk.num_items for chunk in chunks)
    if total != manifest.written:
        raise _Lie(f"written is {manifest.written}, and its chunks hold {total} records")
    return manifest


def _chunk(number: int, entry: object) -> Chunk:
    what = f"chunks[{number}]"
    if not isinstance(entry, dict) or entry.keys() != Chunk.__dataclass_fields__.keys():
        raise _Lie(f"{what} does not have the entries {', '.join(Chunk.__dataclass_fields__)}")
    if not isinstance(entry["filename"], str):
        raise _Lie(f"{what} has the file name {_short(entry['filename'])}")
    return Chunk(
        entry["filename"],
        _count(entry["num_bytes"], f"{what}.num_bytes", _MOST_BYTES),
        _count(entry["num_items"], f"{what}.num_items", _MOST_RECORDS),
        _hash(entry["sha256"], what),
    )


def _loss(reason: str, entry: object) -> Loss:
    if not isinstance(entry, dict) or not isinstance(entry.get("examples"), list):
        raise _Lie(f"dropped[{reason!r}] is no count with examples")
    return Loss(
        _count(entry.get("count"), f"dropped[{reason!r}]", _MOST_RECORDS), tuple(map(str, entry["examples"]))
    )


def _count(value: object, what: str, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:  # True is an int to isinstance
        raise _Lie(f"{what} is {_short(value)}, no whole number from 0 to {most:,}")
    return value


def _hash(value: object, what: str) -> str:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise _Lie(f"the sha256 of {what} is {_short(value)}, not 64 hexadecimal digits")
    return value


def _mapping(content: dict[str, Any], name: str) -> dict[str, Any]:
    if name not in content and name in ("packages", "files"):  # of older versions
        return {}
    return dict(_of_type(content, name, dict, "object"))


def _list(content: dict[str, Any], name: str) -> list[Any]:
    return list(_of_type(content, name, list, "array"))


def _of_type(content: dict[str, Any], name: str, kind: type, json_name: str) -> Any:
    if not isinstance(content.get(name), kind):
        raise _Lie(f"{name} is {_short(content.get(name))}, not a JSON {json_name}")
    return content[name]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
