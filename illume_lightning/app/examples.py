"""Examples to click on, out of conversations that were prepared for training or for evaluating it."""

from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from illume_lightning.data.chat import EDIT, GENERATE, filled
from illume_lightning.data.conversation import IMAGE
from illume_lightning.data.conversation_store import ConversationRecord, ConversationStore
from illume_lightning.data.image import decode
from illume_lightning.data.store import MANIFEST

_HELD_OUT = "val"
_LOOKED_AT = 64  # records of a store, in search of examples that differ

Question = tuple[str, Image.Image | None]
"""A first message, with the picture that it is about."""

EditExample = tuple[Image.Image, str]
"""A picture and what to change."""


@dataclass
class Examples:
    """What to try on each tab."""

    questions: list[Question] = field(default_factory=list)
    """To chat about."""

    prompts: list[str] = field(default_factory=list)
    """What pictures show."""

    edits: list[EditExample] = field(default_factory=list)
    """To edit."""

    @property
    def pictures(self) -> list[Image.Image]:
        """To reconstruct."""
        return [image for image, _ in self.edits]


def read_examples(folder: str | Path, count: int = 3) -> Examples:
    """Take examples from conversations that were held out.

    Args:
        folder: a store of conversations, or a world's folder, whose subfolders have a store named ``val`` each.
        count: most examples of one store, the first whose words differ.

    Raises:
        FileNotFoundError: if there is no store.
        ValueError: if one holds something else than conversations.
    """
    manifests = [Path(folder) / MANIFEST, *sorted(Path(folder).glob(f"*/{_HELD_OUT}/{MANIFEST}"))]
    stores = [manifest.parent for manifest in manifests if manifest.is_file()]
    if not stores:
        raise FileNotFoundError(
            f"{folder} is no store of conversations and has none in subfolders named {_HELD_OUT}: give one that "
            "`illume prepare` made"
        )
    examples = Examples()
    for path in stores:
        store = ConversationStore(path)
        seen: set[str] = set()
        for index in range(min(_LOOKED_AT, len(store))):
            record = store.read(index)
            words = record.conversation.turns[0].text
            if len(seen) < count and words not in seen and _add(record, examples):
                seen.add(words)
    return examples


def _add(record: ConversationRecord, examples: Examples) -> bool:
    """Add what a conversation begins with, if there is a place for it."""
    conversation = record.conversation
    first = next(turn.text for turn in conversation.turns if turn.role == "user")
    images = [Image.fromarray(decode(data)) for data in record.images]
    if conversation.task == "generation" and (words := filled(GENERATE, first)):
        examples.prompts.append(words)
    elif conversation.task == "editing" and (words := filled(EDIT, first)):
        examples.edits.append((images[0], words))
    elif conversation.task in ("text", "understanding") and first.count(IMAGE) == len(images) <= 1:
        question = first.replace(IMAGE, "").strip()
        examples.questions.append((question, images[0] if images else None))
    else:
        return False
    return True
