"""Where conversations come from: annotation files in the schemas that people have, and captioned images.

A record that cannot be used is left out with a reason. Nothing is repaired by guessing: a model that learns from
a wrong guess looks like a bad model, not like bad data.
"""

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from illume_lightning.data.chat import DESCRIBE, EDIT, GENERATE
from illume_lightning.data.conversation import IMAGE, RESOLUTION_TAG, Conversation, Role, Turn
from illume_lightning.data.conversation_store import make_sample
from illume_lightning.data.image import CanonicalImage, Dropped, canonical
from illume_lightning.data.json_file import JsonRecords
from illume_lightning.data.parquet_file import ParquetRows
from illume_lightning.data.part import Lost, Part, Sample
from illume_lightning.data.safe_file import NOT_A_FILE, RefusedFile, read_file
from illume_lightning.data.source import SURROGATE, Rules
from illume_lightning.data.text_tokenizer import TextTokenizer

CaptionTask = Literal["understand", "generate"]

CHAT_KEYS = ("conversations", "messages")
IMAGE_KEYS = ("images", "image")
EDIT_KEYS = (
    ("source_image", "original_image", "source_img", "src_img", "input_image", "source"),
    ("target_image", "edited_image", "target_img", "edited_img", "output_image", "target"),
    ("instruction", "edit_prompt", "edit_instruction"),
)
"""Names that datasets have for the source, the target and the instruction (UltraEdit, InstructPix2Pix,
MagicBrush, SEED-Data-Edit)."""

_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_PLACEHOLDERS = (IMAGE, RESOLUTION_TAG)
_ADDRESS = re.compile(r"data:|[a-zA-Z][\w+.-]*://")


class Unusable(Exception):
    """Why a record is left out."""


class EditColumns(NamedTuple):
    """Names of the three entries of a record that is an edit; None for one that is yet to be found."""

    source: str | None = None
    target: str | None = None
    instruction: str | None = None

    def found_in(self, keys: Collection[str]) -> "EditColumns | None":
        """These names, and `EDIT_KEYS` for those that are None; None if the keys do not have all three."""
        names = [
            next((name for name in ([given] if given else known) if name in keys), None)
            for given, known in zip(self, EDIT_KEYS, strict=True)
        ]
        return EditColumns(*names) if all(names) else None


class Annotation(NamedTuple):
    """A conversation whose images are yet to be read: names of files, or encoded bytes."""

    conversation: Conversation
    images: tuple[str | bytes, ...]


@dataclass(frozen=True)
class AnnotationReader:
    """How a record of an annotation file becomes a sample.

    Args:
        rules: Which images are kept, and the splits.
        tokenizer: Counts the tokens of text.
        image_root: Folder that names of image files are relative to, and that they may not leave.
        columns: Of records that are edits; None for conversations.
    """

    rules: Rules
    tokenizer: TextTokenizer
    image_root: Path
    columns: EditColumns | None = None

    def sample(self, place: str, record: object) -> Sample | Lost:
        """Check the record and read its images.

        The split is decided by a hash of the first image's file, or of the turns if there is no image: records
        that are equal, or begin with the same picture, are never in both.

        Args:
            place: Where the record stands, for messages.
            record: A JSON value, or the bytes of one.
        """
        try:
            if isinstance(record, bytes):
                record = loads(record)
            if not isinstance(record, dict):
                raise Unusable("not a JSON object")
            found = parse_chat(record) if self.columns is None else parse_edit(record, self.columns)
            files = [self._content(image) for image in found.images]
            images = [self._canonical(data) for data in files]
        except Unusable as unusable:
            return self.rules.lost(place, str(unusable))
        key = files[0] if files else found.conversation.to_json().encode()
        return make_sample(
            place,
            found.conversation,
            [image.data for image in images],
            [(image.height, image.width) for image in images],
            self.tokenizer,
            tuple(change for image in images for change in image.converted),
            self.rules.split(key),
        )

    def _content(self, image: str | bytes) -> bytes:
        if isinstance(image, bytes):
            return image
        try:
            return read_file(self.image_root / image, self.image_root, follow_links=self.rules.follow_links)
        except RefusedFile as refused:
            reason = "missing image file" if str(refused) == NOT_A_FILE else f"image {refused}"
            raise Unusable(reason) from refused

    def _canonical(self, data: bytes) -> CanonicalImage:
        image = canonical(data, self.rules.limits)
        if isinstance(image, Dropped):
            raise Unusable(f"unusable image: {image.reason}")
        return image


@dataclass(frozen=True)
class CaptionPart:
    """Captioned images as conversations: a part of a collection of images, with a task."""

    images: Part
    task: CaptionTask
    tokenizer: TextTokenizer

    @property
    def num_items(self) -> int:
        """Number of images."""
        return self.images.num_items

    def read(self) -> Iterator[Sample | Lost]:
        """Read the images and put the captions into turns."""
        for item in self.images.read():
            if isinstance(item, Lost):
                yield item
                continue
            try:
                conversation = caption_conversation(self.task, item.caption)
            except Unusable as unusable:
                yield Lost(item.name, str(unusable), item.split)
                continue
            size = (item.height, item.width)
            yield make_sample(
                item.name, conversation, [item.image], [size], self.tokenizer, item.converted, item.split
            )


@dataclass(frozen=True)
class AnnotationPart:
    """Records of an annotation file."""

    records: JsonRecords | ParquetRows
    reader: AnnotationReader

    @property
    def num_items(self) -> int:
        """Number of records."""
        return self.records.num_items

    def read(self) -> Iterator[Sample | Lost]:
        """Read the records."""
        for place, record in self.records.read():
            yield self.reader.sample(place, record)


def parse_chat(record: dict[str, Any]) -> Annotation:
    """A record of LLaVA, ShareGPT or OpenAI.

    Turns are under "conversations" or "messages": objects with "from" and "value", or "role" and "content".
    The content is a text with `<image>` where an image stands, or a list of texts and images, which are put
    on lines of their own. Images are named under "image" or "images" in order of appearance, or where they
    stand in the list.

    Raises:
        Unusable: If the record breaks a rule of conversations.
    """
    entries = next((record[key] for key in CHAT_KEYS if record.get(key)), None)
    if not isinstance(entries, list):
        raise Unusable("no turns")
    inline: list[Any] = []
    conversation = Conversation(tuple(_turn(entry, inline) for entry in entries))
    outer: Any = next((record[key] for key in IMAGE_KEYS if record.get(key)), [])
    outer = outer if isinstance(outer, list) else [outer]
    if inline and outer:
        raise Unusable("images both in the turns and beside them")
    _check_order(conversation)
    _check_placeholders(conversation, len(inline or outer))
    return Annotation(conversation, tuple(_image(image) for image in inline or outer))


def parse_edit(record: dict[str, Any], columns: EditColumns) -> Annotation:
    """A source image, a target image and an instruction, as the chat format asks for an edit.

    Raises:
        Unusable: If one of them is missing, or the instruction has a placeholder.
    """
    images = []
    for what, column in (("source", columns.source), ("target", columns.target)):
        if not record.get(column or ""):
            raise Unusable(f"no {what} image")
        images.append(_image(record[column or ""]))
    text = record.get(columns.instruction or "")
    instruction = _plain(text, "instruction").rstrip(".").rstrip()
    if not instruction:
        raise Unusable("no instruction")
    request = Turn("user", EDIT.replace("{instruction}", instruction))
    return Annotation(Conversation((request, Turn("assistant", IMAGE))), tuple(images))


def caption_conversation(task: CaptionTask, caption: str) -> Conversation:
    """An image to describe, or to generate, as the chat format asks for it.

    Raises:
        Unusable: If the caption is empty or has a placeholder.
    """
    caption = _plain(caption, "caption")
    if task == "understand":
        return Conversation((Turn("user", DESCRIBE), Turn("assistant", caption)))
    return Conversation((Turn("user", GENERATE.replace("{caption}", caption)), Turn("assistant", IMAGE)))


def _plain(text: object, what: str) -> str:
    """A text from outside, which must have no placeholder; everything else in it is plain."""
    if not isinstance(text, str) or not text.strip():
        raise Unusable(f"no {what}")
    if any(placeholder in text for placeholder in _PLACEHOLDERS):
        raise Unusable(f"{IMAGE} or {RESOLUTION_TAG} in the {what}")
    if SURROGATE.search(text):
        raise Unusable("text is not Unicode")
    return text.strip()


def _turn(entry: object, images: list[Any]) -> Turn:
    """A turn; images that its content names are added to `images`."""
    if not isinstance(entry, dict):
        raise Unusable("a turn is not an object")
    name = entry.get("from") or entry.get("role")
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise Unusable("unknown role")
    content = entry["value"] if entry.get("value") is not None else entry.get("content")
    if isinstance(content, list):
        content = "\n".join(_part(part, images) for part in content)
    if not isinstance(content, str):
        raise Unusable("a turn without text")
    if SURROGATE.search(content):
        raise Unusable("text is not Unicode")
    return Turn(role, content)


def _part(part: object, images: list[Any]) -> str:
    """The text of one element of a list of contents."""
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if isinstance(part, dict) and part.get("type") in ("image", "image_url"):
        image = next((part[key] for key in ("image", "image_url", "path", "url") if part.get(key)), None)
        images += [] if image is None else [image]
        return IMAGE
    raise Unusable("content that is neither text nor image")


def _image(image: object) -> str | bytes:
    """What a record says of an image: a file's name or bytes, or an object that has one of them."""
    if isinstance(image, dict):
        image = next((image[key] for key in ("bytes", "path", "url") if image.get(key)), None)
    if not isinstance(image, str | bytes) or not image:
        raise Unusable("image is neither a file name nor bytes")
    if isinstance(image, str) and _ADDRESS.match(image):
        raise Unusable("image is an address, not a file")
    return image


def _check_order(conversation: Conversation) -> None:
    """One system turn at most, the first; then user and assistant in turn, with an answer in each answer."""
    turns = conversation.turns
    turns = turns[1:] if turns[0].role == "system" else turns
    roles = [turn.role for turn in turns]
    if "system" in roles:
        raise Unusable("a system turn is not the first")
    if "assistant" not in roles:
        raise Unusable("no assistant turn")
    if roles[0] == "assistant":
        raise Unusable("starts with the assistant")
    if any(first == second for first, second in pairwise(roles)):
        raise Unusable("two turns of one side in a row")
    if not all(turn.text.strip() for turn in turns if turn.role == "assistant"):
        raise Unusable("empty assistant turn")


def _check_placeholders(conversation: Conversation, num_images: int) -> None:
    """As many images as stand in the turns, none of them in the system turn, and sizes only of images to come."""
    if any(turn.role == "system" and IMAGE in turn.text for turn in conversation.turns):
        raise Unusable(f"{IMAGE} in the system turn")
    has_target = False
    for turn in reversed(conversation.turns):
        is_answer = turn.role == "assistant"
        if RESOLUTION_TAG in turn.text and is_answer:
            # A generated image gets its size by itself; a second one would be learned.
            raise Unusable(f"{RESOLUTION_TAG} in an assistant turn")
        if RESOLUTION_TAG in turn.text and not has_target:
            raise Unusable(f"{RESOLUTION_TAG} without an image to generate after it")
        has_target |= is_answer and IMAGE in turn.text
    count = len(conversation.is_target)
    if num_images == 1 and not count:
        # Some of LLaVA's files mean an image at the start; others, a picture that nobody asks about.
        raise Unusable(f"an image, but no {IMAGE} in any turn")
    if count != num_images:
        raise Unusable(f"wrong number of images ({count} {IMAGE}, {num_images} images)")


def loads(data: bytes) -> object:
    """A JSON value.

    Raises:
        Unusable: If it is none.
    """
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise Unusable("unreadable JSON") from error
