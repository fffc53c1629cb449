"""Reading a store: records by index, sizes without touching images, and proof that nothing is broken.

A store is a folder with LitData chunks and their `index.json`, `sizes.npy` (int32 (N, 2), rows of height
and width), `checks.npy` (uint32 (N,)) and `manifest.json`; stores of conversations have `rows.npz` too. LitData
has no checksums: a flipped byte in a chunk would silently change one image. Every record is therefore held
against its check when it is read. The manifest has a sha256 of every other file: those of chunks are compared by
`Store.verify`, the others when a store is opened. A store may lie on this machine or far away (`remote`).
"""

import hashlib
import json
import logging
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from illume_lightning.data.manifest import MANIFEST, Chunk, Manifest
from illume_lightning.data.remote import Remote, RemoteFile, copy_manifest, is_remote

log = logging.getLogger(__name__)

SIZES = "sizes.npy"
CHECKS = "checks.npy"
ROWS = "rows.npz"
INDEX = "index.json"
PARTIAL_SUFFIX = ".partial"
CONVERSATIONS = "conversations"
"""The manifest's ``kind`` of stores that `conversation_store.ConversationStore` reads."""

# What LitData's reader raises on damaged chunks, found by overwriting them.
_DAMAGE = (OSError, ValueError, IndexError, KeyError, TypeError, AssertionError, OverflowError, MemoryError,
           RuntimeError, struct.error)  # fmt: skip


class Record(NamedTuple):
    """One sample: encoded image bytes (JPEG, PNG or WebP), its caption, and JSON text ("{}" if nothing)."""

    image: bytes
    caption: str
    meta: str


def record_check(image: bytes, caption: bytes, meta: bytes) -> int:
    """CRC-32 of a record's fields and of their lengths: a flipped bit, or a moved border, gives another one."""
    check = zlib.crc32(struct.pack("<3I", len(image), len(caption), len(meta)))
    for content in (image, caption, meta):
        check = zlib.crc32(content, check)
    return check


class DamagedRecord(ValueError):
    """A record that does not come back as it was written; the message names it, its chunk and the way out."""


class Store:
    """What stores of any content share: records by index, and files that are whole.

    Opening checks that the folder is whole: names, sizes, and the content of what is no chunk; it reads no
    image. LitData is opened lazily, once per process, so a store can be handed to `DataLoader` workers.

    Args:
        path: Folder of the store, on a local or mounted file system, or its address, "s3://..." or "gs://...".
        remote: How a store far away is read.

    Raises:
        FileNotFoundError: If the folder, its manifest or one of its files is missing.
        PermissionError: If credentials for a store far away are missing or refused.
        ConnectionError: If it cannot be reached.
        ValueError: If files of the folder contradict one another.
    """

    def __init__(self, path: str | Path, remote: Remote = Remote()) -> None:
        self.location = str(path).rstrip("/")
        """The folder or address that was given."""
        self._remote = remote if is_remote(path) else None
        self.path = (
            Path(path) if self._remote is None else copy_manifest(self.location, MANIFEST, self._remote)
        )
        """The folder on this machine; of a store far away, that of the copies."""
        self.manifest = _read_manifest(self.path)
        if self._remote is None:
            _check_files(self.path, self.manifest)
        else:
            self._fetch_small_files(self._remote)
        self._check_small_files()
        _check_index(self.path, self.manifest)
        self.sizes: np.ndarray = _numbers(self.path / SIZES, (self.manifest.written, 2))
        """Height and width of each image in pixels, int32 (N, 2)."""
        has_checks = CHECKS in self.manifest.files
        self._checks = _numbers(self.path / CHECKS, (self.manifest.written,)) if has_checks else None
        num_items = [chunk.num_items for chunk in self.manifest.chunks]
        self.chunk_ids: np.ndarray = np.repeat(np.arange(len(num_items), dtype=np.int32), num_items)
        """Chunk of each record, int32 (N,), ascending: records of one chunk lie side by side on disk."""
        self._stream: Any = None
        self._process = 0

    def __len__(self) -> int:
        return self.manifest.written

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stream": None}

    @property
    def has_checks(self) -> bool:
        """Whether every record is checked when it is read; stores of older versions have no checks."""
        return self._checks is not None

    def _record(self, index: int) -> Record:
        """One record.

        Raises:
            IndexError: If the index is out of range.
            DamagedRecord: If the record is not what was written.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {self.location}, which has {len(self)}")
        number = int(self.chunk_ids[index])
        with self._held(number):
            chunk = self.manifest.chunks[number]
            try:
                # LitData waits for minutes for a file that is missing or too short, and reading one that was cut
                # while it is mapped ends the process.
                num_bytes = (self.path / chunk.filename).stat().st_size
                if num_bytes != chunk.num_bytes:
                    raise ValueError(f"the chunk has {num_bytes} bytes instead of {chunk.num_bytes}")
                fields = self.fields(index)
                if self._checks is not None and record_check(*fields) != self._checks[index]:
                    raise ValueError("its bytes are not those that were written")
                image, caption, meta = fields
                return Record(image, caption.decode(), meta.decode())
            except _DAMAGE as error:
                raise self.damaged(index, error) from error

    def damaged(self, index: int, cause: object) -> DamagedRecord:
        """The error for a record that is not what was written.

        Args:
            index: Of the record.
            cause: What is wrong with it.
        """
        path = self.path / self.manifest.chunks[int(self.chunk_ids[index])].filename
        way_out = "copy this file again, or prepare the store again"
        if self._remote is not None:
            way_out = f"delete this copy and it is fetched again, or upload {self.location} again"
        reason = " ".join(str(cause).split()) or type(cause).__name__
        return DamagedRecord(f"record {index} of {self.location} is damaged ({reason}), in {path}; {way_out}")

    def fields(self, index: int) -> list[bytes]:
        """A record's image, caption and meta as bytes, not checked; of a store on this machine."""
        # A forked worker must not share file positions with its parent.
        if self._stream is None or self._process != os.getpid():
            from litdata import StreamingDataset

            self._stream = StreamingDataset(str(self.path), batch_decode=0)
            self._process = os.getpid()
        # LitData gives views into its buffers; a copy lets go of them.
        return [bytes(field) for field in self._stream[int(index)]]

    def remote_chunk(self, index: int) -> RemoteFile | None:
        """The chunk of a record; none if the store is on this machine."""
        return self._remote_file(int(self.chunk_ids[index]))

    def _remote_file(self, chunk_id: int) -> RemoteFile | None:
        if self._remote is None:
            return None
        chunk = self.manifest.chunks[chunk_id]
        url, path = f"{self.location}/{chunk.filename}", self.path / chunk.filename
        return RemoteFile(url, path, self._remote, chunk.num_bytes, chunk.sha256)

    def _held(self, chunk_id: int) -> AbstractContextManager[None]:
        """A chunk on this machine, as long as this is entered."""
        file = self._remote_file(chunk_id)
        return nullcontext() if file is None else file.held()

    def _fetch_small_files(self, remote: Remote) -> None:
        largest = max((chunk.num_bytes for chunk in self.manifest.chunks), default=0)
        if remote.num_bytes < 2 * largest:
            raise ValueError(
                f"remote.cache_gigabytes is {remote.cache_gigabytes:g}, and chunks of {self.location} have up to "
                f"{largest / 10**9:g} GB; at least two of them must fit"
            )
        for name in _small_files(self.manifest):
            RemoteFile(f"{self.location}/{name}", self.path / name, remote).fetch()

    def _check_small_files(self) -> None:
        """Hold the content of the files beside the chunks against the manifest."""
        way_out = "copy the store again or prepare it again" if self._remote is None else "delete this copy"
        for name, digest in self.manifest.files.items():
            if sha256(self.path / name) != digest:
                raise ValueError(
                    f"{self.path / name} is not the file that {MANIFEST} is of (sha256); {way_out}"
                )

    def verify(self) -> None:
        """Read every chunk and compare its sha256 with the manifest.

        Raises:
            ValueError: If chunks differ; the message names them.
        """
        broken = [
            chunk.filename
            for number, chunk in enumerate(self.manifest.chunks)
            if not self._is_whole(number, chunk)
        ]
        if broken:
            raise ValueError(
                f"{len(broken)} of {len(self.manifest.chunks)} chunks of {self.location} differ from {MANIFEST}: "
                f"{', '.join(broken[:5])}; copy these files again or prepare the store again"
            )

    def _is_whole(self, number: int, chunk: Chunk) -> bool:
        with self._held(number):
            return sha256(self.path / chunk.filename) == chunk.sha256


class ImageStore(Store):
    """The records of a store of pictures, or of what was made from them, by index.

    Args:
        path: See `Store`.
        remote: See `Store`.

    Raises:
        FileNotFoundError: See `Store`, as for other errors of the file system.
        ValueError: If files of the folder contradict one another, or it holds conversations.
    """

    def __init__(self, path: str | Path, remote: Remote = Remote()) -> None:
        super().__init__(path, remote)
        if self.manifest.identity.get("kind") == CONVERSATIONS:
            raise ValueError(
                f"{path} holds conversations where pictures are expected; `illume prepare images` makes "
                "stores of pictures"
            )

    def read(self, index: int) -> Record:
        """Read one record.

        Args:
            index: 0 to `len(self) - 1`.

        Raises:
            IndexError: If the index is out of range.
            DamagedRecord: If the record is not what was written.
        """
        return self._record(index)


def sha256(path: Path) -> str:
    """Hash of a file's content, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_stores(path: Path) -> Iterator[Path]:
    """The stores at a path: the folder itself, or its direct subfolders (`train`, `val`), sorted."""
    if (path / MANIFEST).is_file():
        yield path
    elif path.is_dir():
        yield from sorted(child for child in path.iterdir() if (child / MANIFEST).is_file())


def _read_manifest(path: Path) -> Manifest:
    """The manifest of a store, or an error that says what lies at the path instead."""
    if (path / MANIFEST).is_file():
        return Manifest.read(path / MANIFEST)
    parts = list(find_stores(path))
    if parts:
        raise FileNotFoundError(f"{path} holds {len(parts)} stores; name one: {', '.join(map(str, parts))}")
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    if partial.is_dir() or path.name.endswith(PARTIAL_SUFFIX):
        raise FileNotFoundError(
            f"the preparation of {path} was interrupted; run the same command again to finish it"
        )
    if path.is_dir():
        raise FileNotFoundError(
            f"{path} is not a store (it has no {MANIFEST}); prepare it, or name another folder"
        )
    raise FileNotFoundError(f"there is no store at {path}; prepare it first")


def _small_files(manifest: Manifest) -> tuple[str, ...]:
    """Names of a store's files beside the chunks and the manifest."""
    of_kind = (ROWS,) if manifest.identity.get("kind") == CONVERSATIONS else ()
    return tuple(dict.fromkeys((INDEX, SIZES, *of_kind, *manifest.files)))


def _check_files(path: Path, manifest: Manifest) -> None:
    """Hold the names and sizes on disk against the manifest; chunks' content is the affair of `Store.verify`."""
    for name in (*_small_files(manifest), *(chunk.filename for chunk in manifest.chunks)):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path / name} is missing; copy the store again or prepare it again")
    for chunk in manifest.chunks:
        num_bytes = (path / chunk.filename).stat().st_size
        if num_bytes != chunk.num_bytes:
            raise ValueError(
                f"{path / chunk.filename} has {num_bytes} bytes instead of {chunk.num_bytes}; "
                "copy the file again or prepare the store again"
            )


def _check_index(path: Path, manifest: Manifest) -> None:
    """Hold LitData's list of chunks against the manifest."""
    try:
        index = json.loads((path / INDEX).read_bytes())
        listed = [(chunk["filename"], chunk["chunk_size"]) for chunk in index["chunks"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path / INDEX} is damaged; copy the store again or prepare it again") from error
    if listed != [(chunk.filename, chunk.num_items) for chunk in manifest.chunks]:
        raise ValueError(f"{path / INDEX} and {MANIFEST} list different chunks; prepare the store again")


def _numbers(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """An array of a store, of the shape that its manifest tells."""
    try:
        found: np.ndarray = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, SyntaxError, MemoryError) as error:
        raise ValueError(f"{path} is damaged ({error}); copy the store again or prepare it again") from error
    if found.shape != shape:
        raise ValueError(
            f"{path} has shape {found.shape}, the manifest counts {shape[0]} records; the store is damaged: copy it "
            "or prepare it again"
        )
    if found.dtype.kind not in "iu" or (found.size and found.min() < 0):
        raise ValueError(f"{path} holds other values than whole numbers from 0; prepare the store again")
    return found
