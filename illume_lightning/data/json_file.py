"""Files of JSON Lines or of one JSON array, cut between records into stretches that are read each by itself.

Cutting looks for the ends of lines or of the array's elements only; what stands between them may be anything.
"""

import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass

from illume_lightning.data.input_file import InputFile

# A string, or what opens, closes and separates values. Possessive: no way back, and no memory for one.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[][{},]', re.DOTALL)
_ARRAY = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[")


@dataclass(frozen=True)
class JsonRecords:
    """Records of JSON Lines or of a JSON array: the bytes of the file from `start` to `stop`."""

    file: InputFile
    start: int
    stop: int
    first: int
    """Number of the first record in the file, from 0; of lines, empty ones count."""

    num_items: int
    is_array: bool

    def read(self) -> Iterator[tuple[str, bytes]]:
        """Read the records, not parsed, with their places.

        A place is "file.jsonl:17", the 17th line, or "file.json#16", the same in an array.
        """
        with self.file.path.open("rb") as stream:
            stream.seek(self.start)
            data = stream.read(self.stop - self.start)
        spans = _elements if self.is_array else _lines
        for number, (start, stop) in enumerate(spans(data, 0), self.first):
            content = data[start:stop]
            if content.strip():
                place = f"#{number}" if self.is_array else f":{number + 1}"
                yield self.file.name + place, content


def scan_json(file: InputFile, part_items: int) -> list[JsonRecords]:
    """Find the bytes at which stretches begin.

    Args:
        file: The file; none of its records needs to be readable.
        part_items: Records of a stretch; of lines, empty ones count.

    Raises:
        ValueError: If the file is empty, or the array does not end with it.
    """
    if not file.path.stat().st_size:
        raise ValueError(f"{file.path} is empty; leave it out")
    starts: list[int] = []
    counts: list[int] = []
    with file.path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        opening = _ARRAY.match(data)
        spans, begin = (_elements, opening.end()) if opening else (_lines, 0)
        end = begin
        for number, (start, end) in enumerate(spans(data, begin)):
            if number % part_items == 0:
                starts.append(start)
                counts.append(0)
            counts[-1] += bool(data[start:end].strip())
        if opening and data[end:].strip() != b"]":
            raise ValueError(
                f"{file.path} is damaged: its JSON array does not end with the file; fetch it again, or give "
                "JSON Lines"
            )
    return [
        JsonRecords(file, start, stop, number * part_items, count, opening is not None)
        for number, (start, stop, count) in enumerate(zip(starts, [*starts[1:], end], counts, strict=True))
    ]


def _lines(data: bytes | mmap.mmap, start: int) -> Iterator[tuple[int, int]]:
    """Where the lines begin and end."""
    while start < len(data):
        stop = data.find(b"\n", start)
        stop = len(data) if stop < 0 else stop
        yield start, stop
        start = stop + 1


def _elements(data: bytes | mmap.mmap, start: int) -> Iterator[tuple[int, int]]:
    """Where the values of a JSON array begin and end, up to its end or the end of the data."""
    depth = 0
    for match in _TOKEN.finditer(data, start):
        token = data[match.start()]
        if token in b"[{":
            depth += 1
        elif token in b"]}":
            depth -= 1
        if depth < 0:
            yield start, match.start()
            return
        if token == ord(",") and not depth:
            yield start, match.start()
            start = match.end()
    yield start, len(data)
