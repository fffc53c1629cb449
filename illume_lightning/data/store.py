"""Reading a store: records by index, sizes without touching images, and proof that nothing is broken.

A store is a folder with LitData chunks and their `index.json`, `sizes.npy` (int32 (N, 2), rows of height
and width) and `manifest.json`; stores of conversations have `rows.npz` too. LitData has no checksums: a
flipped byte in a chunk silently changes one image. The manifest therefore holds a sha256 for each chunk,
checked by `Store.verify`. A store may lie on this machine or far away (`remote`).
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from illume_lightning.data.remote import Remote, RemoteFile, copy_manifest, is_remote

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SIZES = "sizes.npy"
ROWS = "rows.npz"
INDEX = "index.json"
PARTIAL_SUFFIX = ".partial"
CONVERSATIONS = "conversations"
"""The manifest's ``kind`` of stores that `conversation_store.ConversationStore` reads."""


class Record(NamedTuple):
    """One sample: encoded image bytes (JPEG, PNG or WebP), its caption, and JSON text ("{}" if nothing)."""

    image: bytes
    caption: str
    meta: str


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
    """

    written: int
    dropped: dict[str, Loss]
    converted: dict[str, int]
    sizes: dict[str, Any]
    chunks: tuple[Chunk, ...]
    identity: dict[str, Any]
    packages: dict[str, str] = field(default_factory=dict)

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
            ValueError: If it is no manifest or of an unknown version.
        """
        try:
            content = json.loads(path.read_text())
            version = content.pop("version")
        except (json.JSONDecodeError, KeyError, AttributeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not the manifest of a store; prepare the data again") from error
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format version {version}, this code reads {FORMAT_VERSION}; "
                "prepare the data again"
            )
        content["dropped"] = {
            reason: Loss(loss["count"], tuple(loss["examples"]))
            for reason, loss in content["dropped"].items()
        }
        content["chunks"] = tuple(Chunk(**chunk) for chunk in content["chunks"])
        return Manifest(**content)


class Store:
    """What stores of any content share: records by index, and files that are whole.

    Opening checks that the folder is whole, by names and sizes; it reads no image. LitData is opened
    lazily, once per process, so a store can be handed to `DataLoader` workers.

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
        _check_index(self.path, self.manifest)
        self.sizes: np.ndarray = np.load(self.path / SIZES)
        """Height and width of each image in pixels, int32 (N, 2)."""
        if self.sizes.shape != (self.manifest.written, 2):
            raise ValueError(
                f"{self.path / SIZES} has shape {self.sizes.shape}, the manifest counts "
                f"{self.manifest.written} records; the store is damaged: copy it or prepare it again"
            )
        num_items = [chunk.num_items for chunk in self.manifest.chunks]
        self.chunk_ids: np.ndarray = np.repeat(np.arange(len(num_items), dtype=np.int32), num_items)
        """Chunk of each record, int32 (N,), ascending: records of one chunk lie side by side on disk."""
        self._stream: Any = None
        self._process = 0

    def __len__(self) -> int:
        return self.manifest.written

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stream": None}

    def _record(self, index: int) -> Record:
        """One record; IndexError if the index is out of range."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {self.location}, which has {len(self)}")
        with self._held(int(self.chunk_ids[index])):
            return self._read(index)

    def _read(self, index: int) -> Record:
        # A forked worker must not share file positions with its parent.
        if self._stream is None or self._process != os.getpid():
            from litdata import StreamingDataset

            self._stream = StreamingDataset(str(self.path), batch_decode=0)
            self._process = os.getpid()
        # LitData gives views into its buffers; a copy lets go of them.
        image, caption, meta = (bytes(field) for field in self._stream[int(index)])
        return Record(image, caption.decode(), meta.decode())

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
        has_rows = self.manifest.identity.get("kind") == CONVERSATIONS
        for name in (INDEX, SIZES, *([ROWS] if has_rows else [])):
            RemoteFile(f"{self.location}/{name}", self.path / name, remote).fetch()

    def verify(self) -> None:
        """Read every chunk and compare its sha256 with the manifest.

        Raises:
            ValueError: If chunks differ; the message names them.
        """
        broken = []
        for number, chunk in enumerate(self.manifest.chunks):
            with self._held(number):
                if sha256(self.path / chunk.filename) != chunk.sha256:
                    broken.append(chunk.filename)
        if broken:
            raise ValueError(
                f"{len(broken)} of {len(self.manifest.chunks)} chunks of {self.location} differ from {MANIFEST}: "
                f"{', '.join(broken[:5])}; copy these files again or prepare the store again"
            )


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


def _check_files(path: Path, manifest: Manifest) -> None:
    """Hold the names and sizes on disk against the manifest; a content check is `Store.verify`."""
    for name in (INDEX, SIZES, *(chunk.filename for chunk in manifest.chunks)):
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
    index = json.loads((path / INDEX).read_text())
    listed = [(chunk["filename"], chunk["chunk_size"]) for chunk in index["chunks"]]
    if listed != [(chunk.filename, chunk.num_items) for chunk in manifest.chunks]:
        raise ValueError(f"{path / INDEX} and {MANIFEST} list different chunks; prepare the store again")
