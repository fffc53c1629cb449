"""A folder of answers: pictures, what was said, and a sheet of all; a kill loses what was under way, no more."""

import fcntl
import io
import json
import logging
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from illume_lightning.lit.contact_sheet import contact_sheet
from illume_lightning.lit.job_lines import Line, words

log = logging.getLogger(__name__)

METADATA = "illume"
"""Key of the text in a PNG that holds its record as JSON; ``prompt`` holds the line's words."""

RECORDS = "answers.jsonl"
SHEET = "index.html"
_PICTURES = "pictures"
_PARTS = "answers"
_LOCK = "lock"


class Answer(NamedTuple):
    """What became of a line.

    Args:
        record: ``id``, ``place`` and ``task`` of the line; ``error``, or ``text``, ``pictures`` (names of files),
            ``settings`` (all that decides the answer), ``made_by`` and ``seconds``.
        images: the pictures.
    """

    record: dict[str, Any]
    images: Sequence[Image.Image] = ()


def failed(line: Line, error: str) -> Answer:
    """What became of a line that can't be worked on."""
    return Answer({"id": line.id, "place": line.place, "task": line.task, "error": error})


def picture_names(id: str, count: int) -> list[str]:
    """Files of an answer's pictures; no id has a tilde."""
    return [f"{_PICTURES}/{id}{f'~{number}' if number > 1 else ''}.png" for number in range(1, count + 1)]


class AnswerFolder:
    """Pictures in ``pictures``, records in ``answers``, and all of them in ``answers.jsonl`` and ``index.html``.

    Several processes may write at once, each to a file of its own in ``answers``.

    Args:
        path: of the folder, made where it is missing.

    Raises:
        ValueError: if there is something else in it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._parts = self.path / _PARTS
        if self.path.exists() and not self._parts.is_dir() and any(self.path.iterdir()):
            raise ValueError(f"{path} is not empty and holds no answers: choose another folder")
        self._parts.mkdir(parents=True, exist_ok=True)
        (self.path / _PICTURES).mkdir(exist_ok=True)

    def finished(self) -> dict[str, dict[str, Any]]:
        """Records by id of the answers that are there, with all their pictures."""
        return {id: record for id, record in self._records().items() if "error" not in record}

    def write(self, answers: Iterable[Answer], part: str, lines: Sequence[Line], position: int = 0) -> None:
        """Write answers as they come, under a progress bar.

        Args:
            answers: to write, of those lines that are not finished; errors are reported.
            part: name of this process's records.
            lines: of this process.
            position: of the progress bar.

        Raises:
            ValueError: if another process is writing this part.
        """
        finished = self.finished()
        done = sum(line.id in finished and not line.error for line in lines)
        count, start = 0, time.perf_counter()
        with (
            (self._parts / f"{part}.jsonl").open("ab") as stream,
            tqdm(
                None, part, len(lines), initial=done, unit="task", position=position, disable=None
            ) as progress,
        ):
            self._begin(stream)
            for answer in answers:
                if "error" in answer.record:
                    log.warning("%s: %s", answer.record["place"], answer.record["error"])
                for name, image in zip(answer.record.get("pictures", ()), answer.images, strict=True):
                    _place(self.path / name, _png(image, answer.record))
                stream.write(_json_line(answer.record))
                stream.flush()
                os.fsync(stream.fileno())
                count += len(answer.images)
                progress.set_postfix_str(f"{count / (time.perf_counter() - start):.2f} pictures/s")
                progress.update()

    def finish(self, lines: Sequence[Line]) -> list[dict[str, Any] | None]:
        """Write ``answers.jsonl`` and ``index.html`` of all that is there so far.

        Args:
            lines: of the job, all of them.

        Returns:
            The record of each line; none where others are still to work on it.
        """
        with (self._parts / _LOCK).open("w") as lock:
            # Whoever comes last sees all that the others wrote.
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = self._records()
            records = [
                failed(line, line.error).record if line.error else found.get(line.id) for line in lines
            ]
            there = [record for record in records if record is not None]
            _place(self.path / RECORDS, b"".join(map(_json_line, there)))
            _place(self.path / SHEET, contact_sheet(there, self.path).encode())
        return records

    def _records(self) -> dict[str, dict[str, Any]]:
        """Records by id; errors where there is no answer."""
        found: dict[str, dict[str, Any]] = {}
        for path in sorted(self._parts.glob("*.jsonl")):
            for record in _read_records(path):
                if "error" in record:
                    is_news = "error" in found.get(record["id"], record)
                else:
                    is_news = all((self.path / name).is_file() for name in record["pictures"])
                if is_news:
                    found[record["id"]] = record
        return found

    def _begin(self, stream: BinaryIO) -> None:
        """Hold a part for this process; the system lets go when the process ends, however it ends."""
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process is writing this share of {self.path}: wait for it, or choose another folder"
            ) from error
        if stream.tell():
            stream.write(b"\n")  # ends a line that a kill cut off


def _read_records(path: Path) -> Iterable[dict[str, Any]]:
    for data in path.read_bytes().split(b"\n"):
        try:
            record = json.loads(data)
        except ValueError:  # empty, or cut off by a kill
            continue
        yield record


def _json_line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def _png(image: Image.Image, record: dict[str, Any]) -> bytes:
    info = PngInfo()
    info.add_itxt(METADATA, json.dumps(record, ensure_ascii=False))
    info.add_itxt("prompt", words(record["task"]))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def _place(path: Path, data: bytes) -> None:
    """Write a file so that it is there in full or not at all, even after a power cut."""
    scratch = path.with_name(path.name + ".writing")
    with scratch.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)
