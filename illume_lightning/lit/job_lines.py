"""Lines of a job: JSON that asks for pictures and answers, and the tasks that it stands for.

A line is one of

- ``{"prompt": ..., "size": [height, width]}``: make a picture; the size may be left out;
- ``{"image": file, "instruction": ...}``: change a picture;
- ``{"question": ..., "image": file or files}``: answer; the question may have an ``<image>`` where each stands;
- ``{"messages": [...]}``: answer the last of some messages, as ``Chat`` takes them, with files in place of images;

and may have an ``id``, which names its picture, and a ``seed``.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from illume_lightning.data.conversation import IMAGE
from illume_lightning.data.image import Dropped, canonical, decode
from illume_lightning.lit.prompts import Chat, Edit, Generate, Task
from illume_lightning.resolution import Size

STDIN = "-"

_KEYS = {
    "prompt": {"size"},
    "instruction": {"image"},
    "question": {"image"},
    "messages": set[str](),
}
"""What says the kind of a line, and what else such a line may have."""

_ID = re.compile(r"\w[\w .,()+=@#-]*")
_MAX_ID_BYTES = 200
_MAX_SEED = 2**63 - 1


class Line(NamedTuple):
    """One line of a job."""

    place: str
    """Where it stands, such as "jobs.jsonl:17"."""

    id: str
    """Its own, or its number, from 000001."""

    task: dict[str, Any]
    """What it says, without the id."""

    error: str = ""
    """Why it can't be worked on; empty where it can, as far as is known without its images and the model."""


def read_jobs(path: str) -> tuple[list[Line], Path]:
    """Read a file of lines, or standard input.

    Args:
        path: the file, ``-`` for standard input.

    Returns:
        The lines, and the folder that names of images are relative to: the file's, or the working directory.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if there is no line in it.
    """
    if path == STDIN:
        return read_lines(sys.stdin.buffer, "standard input"), Path.cwd()
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}: give JSON Lines, or {STDIN} for standard input")
    with Path(path).open("rb") as stream:
        return read_lines(stream, path), Path(path).parent


def prompt_lines(prompts: Sequence[str]) -> list[Line]:
    """Lines that ask for a picture of each prompt."""
    return read_lines((json.dumps({"prompt": prompt}).encode() for prompt in prompts), "prompt")


def read_lines(source: Iterable[bytes], name: str) -> list[Line]:
    """Parse lines; empty ones are left out, and count.

    Args:
        source: the lines.
        name: of it, for messages.

    Raises:
        ValueError: if there is none. What is wrong with one of them stands in its ``error``.
    """
    lines: list[Line] = []
    places: dict[str, str] = {}
    for number, data in enumerate(source, 1):
        if not data.strip():
            continue
        line = _line(f"{name}:{number}", f"{number:06d}", data)
        if not line.error and line.id in places:
            line = line._replace(error=f"the id {line.id!r} stands in {places[line.id]} too")
        elif not line.error:
            places[line.id] = line.place
        lines.append(line)
    if not lines:
        raise ValueError(f"{name} has no line: give prompts, or JSON Lines such as {{'prompt': ...}}")
    return lines


def to_task(task: dict[str, Any], folder: Path, seed: int, size: Size | None, max_tokens: int) -> Task:
    """The task that a line without errors stands for.

    Args:
        task: of the line.
        folder: that names of images are relative to.
        seed: of the drawing.
        size: height and width of pictures where the line has none.
        max_tokens: most tokens of an answer in words.

    Raises:
        ValueError: if an image is missing or can't be read; names it.
    """
    if "prompt" in task:
        height, width = task.get("size") or size or (0, 0)
        return Generate(task["prompt"], (height, width) if height else None, seed)
    if "instruction" in task:
        return Edit(_read_image(folder, task["image"]), task["instruction"], seed)
    messages = [
        {"role": message["role"], "content": [_with_image(item, folder) for item in message["content"]]}
        for message in _messages(task)
    ]
    return Chat(messages, seed, max_tokens=max_tokens)


def image_digests(task: dict[str, Any], folder: Path) -> dict[str, str]:
    """The images of a line by name: the first 16 digits of their files' sha256.

    Raises:
        ValueError: if one is missing or can't be read; names it.
    """
    names = [task["image"]] if "instruction" in task else []
    if "question" in task or "messages" in task:
        content = [item for message in _messages(task) for item in message["content"]]
        names = [item["image"] for item in content if item["type"] == "image"]
    return {name: hashlib.sha256(_read(folder, name)).hexdigest()[:16] for name in names}


def words(task: dict[str, Any]) -> str:
    """What a line asks for, in its own words; empty where it has errors and says nothing."""
    for key in ("prompt", "instruction", "question"):
        if isinstance(task.get(key), str):
            return str(task[key])
    try:
        last = _messages(task)[-1] if "messages" in task else {"content": []}
    except ValueError:  # of a line with errors
        return ""
    return "\n".join(item["text"] for item in last["content"] if "text" in item)


def _line(place: str, number: str, data: bytes) -> Line:
    try:
        task = json.loads(data)
        if not isinstance(task, dict):
            raise ValueError("it is no JSON object")
        json.dumps(task, ensure_ascii=False).encode()  # fails for halves of characters
    except (ValueError, RecursionError) as error:
        reason = "half a character" if isinstance(error, UnicodeEncodeError) else str(error)
        return Line(place, number, {}, f"the line can't be read: {reason}")
    id = task.pop("id", number)
    try:
        _check_id(id)
    except ValueError as error:
        return Line(place, number, task, str(error))
    try:
        _check(task)
    except ValueError as error:
        return Line(place, str(id), task, str(error))
    return Line(place, str(id), task)


def _check_id(id: object) -> None:
    """It becomes a file's name."""
    is_name = (isinstance(id, str) and _ID.fullmatch(id)) or (type(id) is int and id >= 0)
    if not is_name or len(str(id).encode()) > _MAX_ID_BYTES:
        raise ValueError(
            f"the id {str(id)[:80]!r} can't name a picture: use letters, digits, spaces and .,()+=@#-_, a letter or "
            f"digit first, at most {_MAX_ID_BYTES} bytes"
        )


def _check(task: dict[str, Any]) -> None:
    kinds = [kind for kind in _KEYS if kind in task]
    if len(kinds) != 1:
        found = " and ".join(kinds) or "none of them"
        raise ValueError(f"a line has one of {', '.join(_KEYS)}; this one has {found}")
    (kind,) = kinds
    known = {"seed", kind} | _KEYS[kind]
    if unknown := sorted(set(task) - known):
        raise ValueError(
            f"unknown {', '.join(map(repr, unknown))}: beside id, this line may have {', '.join(sorted(known))}"
        )
    if kind != "messages" and not (isinstance(task[kind], str) and task[kind].strip()):
        raise ValueError(f"the {kind} is {task[kind]!r}: it must be a text, and not empty")
    seed = task.get("seed", 0)
    if type(seed) is not int or not 0 <= seed <= _MAX_SEED:
        raise ValueError(f"the seed is {seed!r}: it must be a whole number from 0 to 2^63 - 1")
    if "size" in task:
        _check_size(task["size"])
    if kind == "instruction" and not isinstance(task.get("image"), str):
        raise ValueError(f"an instruction is for one image: 'image' is {task.get('image')!r}; name its file")
    if kind in ("question", "messages"):
        _messages(task)


def _check_size(size: object) -> None:
    if not (
        isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)
    ):
        raise ValueError(f"the size is {size!r}: give [height, width] in pixels")


def _messages(task: dict[str, Any]) -> list[dict[str, Any]]:
    """Messages of a question or conversation: each with a list of content, in which files stand for images.

    Raises:
        ValueError: if they are not such messages, or there is an ``<image>`` for too few or too many images.
    """
    if "question" in task:
        return [{"role": "user", "content": _content(task["question"], task.get("image", []))}]
    given = task["messages"]
    if not isinstance(given, list) or not given:
        raise ValueError("the messages are no list of messages")
    messages = []
    for message in given:
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise ValueError(
                f"a message is {str(message)[:80]!r}: give its role and content, and nothing else"
            )
        content = message["content"]
        content = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(content, list):
            raise ValueError(f"the content of a message is {content!r}: give a text or a list")
        for item in content:
            _check_item(item)
        messages.append({"role": message["role"], "content": content})
    return messages


def _check_item(item: object) -> None:
    kind = item.get("type") if isinstance(item, dict) else None
    if not isinstance(item, dict) or kind not in ("text", "image") or set(item) != {"type", kind}:
        raise ValueError(
            f"a message holds {str(item)[:80]!r}: use {{'type': 'text', 'text': ...}} or {{'type': 'image', "
            "'image': file}"
        )
    if not isinstance(item[kind], str):
        raise ValueError(
            f"the {kind} of a message is {item[kind]!r}: give a {kind} or its file's name as text"
        )
    if kind == "text" and IMAGE in item[kind]:
        raise ValueError(f"the text of a message has an {IMAGE}: give the image beside it, with type 'image'")


def _content(question: str, images: object) -> list[dict[str, str]]:
    """A question cut at its ``<image>``; where it has none, the images come first."""
    names = [images] if isinstance(images, str) else images
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"'image' is {images!r}: give the name of a file, or a list of names")
    first, *others = question.split(IMAGE)
    texts = (
        [first, *(text.removeprefix("\n") for text in others)] if others else [*("" for _ in names), first]
    )
    if len(texts) - 1 != len(names):
        raise ValueError(f"the question has {len(others)} {IMAGE} for {len(names)} images: give one for each")
    content = [{"type": "text", "text": texts[0]}]
    for name, text in zip(names, texts[1:], strict=True):
        content += [{"type": "image", "image": name}, {"type": "text", "text": text}]
    return [item for item in content if item.get("text") != ""]


def _with_image(item: dict[str, str], folder: Path) -> dict[str, Any]:
    if item["type"] == "text":
        return item
    return {"type": "image", "image": _read_image(folder, item["image"])}


def _read_image(folder: Path, name: str) -> Image.Image:
    image = canonical(_read(folder, name))
    if isinstance(image, Dropped):
        raise ValueError(f"the image {name} can't be used: {image.reason}")
    return Image.fromarray(decode(image.data))


def _read(folder: Path, name: str) -> bytes:
    path = os.path.join(folder, name)
    if not os.path.isfile(path):  # also of names that no file can have; pipes and devices would never end
        raise ValueError(f"there is no image {path}")
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"the image {path} can't be read: {error.strerror}") from error
