"""Fetching chunks of stores far away before they are read, in the order of the plan."""

import logging
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from os import getpid
from queue import SimpleQueue
from typing import Any, Protocol, runtime_checkable

from illume_lightning.data.remote import RemoteFile
from illume_lightning.data.store import Store

log = logging.getLogger(__name__)

_MAX_BATCHES = 256
_SHARE = 0.5  # of the cache; the rest is for what is being read
_THREADS = 2  # of each process


@runtime_checkable
class StoreReader(Protocol):
    """A reader that can tell which records it will read."""

    @property
    def stores(self) -> Sequence[Store]:
        """All that it reads from."""
        ...

    def records(self, items: Any) -> Iterable[tuple[Store, int]]:
        """Store and number of every record of a batch."""
        ...


def look_ahead(reader: Any, batches: Iterable[Any]) -> Iterator[tuple[Any, tuple[RemoteFile, ...]]]:
    """The batches, each with the chunks to begin to fetch by the time that it is read.

    As many batches are looked at in advance as half of the cache can hold the chunks of; none where all stores
    are on this machine.

    Args:
        reader: reads the batches.
        batches: what the reader takes for each batch.
    """
    chunks = [store.remote_chunk(0) for store in reader.stores] if isinstance(reader, StoreReader) else []
    caches = [chunk.remote.num_bytes for chunk in chunks if chunk is not None]
    if not caches:
        yield from ((items, ()) for items in batches)
        return
    window = _Window(_SHARE * min(caches))
    for items in batches:
        found = (store.remote_chunk(index) for store, index in reader.records(items))
        window.add(items, [file for file in found if file is not None])
        while window.is_full:
            yield window.pop()
    while window.waiting:
        yield window.pop()


class _Window:
    """The batches that are looked at in advance, and their chunks."""

    def __init__(self, max_bytes: float) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self.waiting: deque[tuple[Any, set[RemoteFile]]] = deque()
        self._users: Counter[RemoteFile] = Counter()
        self._new: list[RemoteFile] = []

    def add(self, items: Any, files: Sequence[RemoteFile]) -> None:
        """Add a batch."""
        self.waiting.append((items, set(files)))
        for file in dict.fromkeys(files):  # in order
            if not self._users[file]:
                self._new.append(file)
                self.num_bytes += file.num_bytes
            self._users[file] += 1

    @property
    def is_full(self) -> bool:
        """Whether the first batch has to go."""
        return len(self.waiting) > (1 if self.num_bytes > self.max_bytes else _MAX_BATCHES)

    def pop(self) -> tuple[Any, tuple[RemoteFile, ...]]:
        """The first batch, and the chunks that are new since the one before."""
        items, files = self.waiting.popleft()
        for file in files:
            self._users[file] -= 1
            if not self._users[file]:
                del self._users[file]
                self.num_bytes -= file.num_bytes
        new, self._new = tuple(self._new), []
        return items, new


def fetch_ahead(files: Iterable[RemoteFile]) -> None:
    """Begin to fetch files in this process, in order; what fails is left to whoever reads it."""
    for file in files:
        _queue(getpid()).put(file)


@lru_cache(maxsize=1)
def _queue(process: int) -> "SimpleQueue[RemoteFile]":
    """The queue of this process, whose threads a fork does not inherit."""
    queue: SimpleQueue[RemoteFile] = SimpleQueue()
    for _ in range(_THREADS):
        threading.Thread(target=_fetch_all, args=(queue,), daemon=True).start()
    return queue


def _fetch_all(queue: "SimpleQueue[RemoteFile]") -> None:
    while True:
        file = queue.get()
        try:
            file.fetch(ahead=True)
        except (OSError, ValueError) as error:
            log.debug("%s is not fetched ahead: %s", file.url, error)
