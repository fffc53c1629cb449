"""From what a user wants to what the engine answers: prompts with pictures, sizes and an unconditional twin."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from illume_lightning.data.chat import EDIT, GENERATE, prompt, unconditional
from illume_lightning.data.conversation import IMAGE, RESOLUTION_TAG, Conversation, Turn
from illume_lightning.data.geometry import Fitted, fit_inside
from illume_lightning.data.packing import SizedImage
from illume_lightning.data.text_tokenizer import TextTokenizer
from illume_lightning.data.token_sequence import Codes, token_sequence
from illume_lightning.image_layout import image_layout
from illume_lightning.nn.generation import Prompt, Request
from illume_lightning.nn.token_sampling import SegmentSampling, TokenSampling
from illume_lightning.resolution import Size, any_resolution, nearest_ratio
from illume_lightning.vocabulary import Vocabulary

# Possessive: no way back, and no time for one.
_SIGNS = re.compile(r"(?<!<)<++image>++|(?<!\{)\{++resolution_tag\}++")


@dataclass(frozen=True)
class MadeImage:
    """A picture that the model made.

    Args:
        image: RGB.
        codes: semantic and pixel codes, row by row; a conversation goes on with these.
        size: height and width that the codes stand for; the diffusion decoder's picture is twice as large.
    """

    image: Image.Image
    codes: Codes
    size: Size


@dataclass(frozen=True)
class Generate:
    """Make a picture from words.

    Args:
        prompt: what it shows.
        size: height and width in pixels; by default the model's square.
        seed: of the drawing.
        sampling: settings; by default the model's for pictures.
    """

    prompt: str
    size: Size | None = None
    seed: int = 0
    sampling: TokenSampling | None = None


@dataclass(frozen=True)
class Edit:
    """Change a picture by an instruction.

    Args:
        image: RGB, of any size; the result has the same.
        instruction: what to change.
        seed: of the drawing.
        sampling: settings; by default the model's for edits.
    """

    image: Image.Image
    instruction: str
    seed: int = 0
    sampling: TokenSampling | None = None


@dataclass(frozen=True)
class Chat:
    """Answer the last message of a conversation, in words and, where the model wants to, pictures.

    Args:
        messages: as Hugging Face's chat templates take them: ``role`` is system, user or assistant; ``content`` is a
            text or a list of ``{"type": "text", "text": ...}`` and ``{"type": "image", "image": ...}``, the image
            RGB or a ``MadeImage``.
        seed: of the drawing.
        sampling: settings; by default the model's for conversations.
        max_tokens: most tokens of the answer.
    """

    messages: Sequence[Mapping[str, Any]]
    seed: int = 0
    sampling: TokenSampling | None = None
    max_tokens: int = 512


Task = Generate | Edit | Chat


@dataclass(frozen=True)
class Defaults:
    """Sampling of each task where it names none: the official release's scripts."""

    generate: TokenSampling = TokenSampling()
    edit: TokenSampling = TokenSampling(
        semantic=SegmentSampling(0.7, 512, 0.8), pixel=SegmentSampling(0.7, 1536, 0.8), guidance=1.25
    )
    chat: TokenSampling = TokenSampling()


class Asked(NamedTuple):
    """A request, and how the picture that was edited was fitted."""

    request: Request
    fitted: Fitted | None = None


class Prompts:
    """Makes requests of tasks.

    Args:
        vocabulary: of the model.
        tokenizer: of text.
        sizes: heights and widths of pictures that the model was trained to make; the first is the default.
        max_side: square root of the largest area of pictures to look at, in pixels.
        encode: codes of a picture (1, 3, H, W) in [-1, 1] that stands in an assistant's turn and was not made here,
            or of one to look at where input is discrete.
        defaults: sampling of each task.
        release_prompts: the official release's unconditional prompts instead of masked text.
        discrete_input: of the model: pictures to look at are codes.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        tokenizer: TextTokenizer,
        sizes: Sequence[Size],
        max_side: int,
        encode: Callable[[Tensor], Codes],
        defaults: Defaults,
        release_prompts: bool = False,
        discrete_input: bool = False,
    ) -> None:
        self.vocabulary, self.tokenizer = vocabulary, tokenizer
        self.sizes, self.max_side, self.defaults = tuple(sizes), max_side, defaults
        self._encode, self._release_prompts = encode, release_prompts
        self._discrete_input = discrete_input

    def ask(self, task: Task) -> Asked:
        """The request of a task.

        Raises:
            ValueError: if it is empty, has a size without tokens, or is no proper conversation; says what.
        """
        if isinstance(task, Generate):
            return self._generate(task)
        return self._edit(task) if isinstance(task, Edit) else self._chat(task)

    def _generate(self, task: Generate) -> Asked:
        text = GENERATE.replace("{caption}", _plain(task.prompt, "prompt"))
        conversation = Conversation((Turn("user", text), Turn("assistant", IMAGE)))
        size = task.size or self.sizes[0]
        return Asked(
            self._picture(conversation, [], size, task.seed, task.sampling or self.defaults.generate)
        )

    def _edit(self, task: Edit) -> Asked:
        instruction = _plain(task.instruction, "instruction").rstrip(".")
        text = EDIT.replace("{instruction}", instruction)
        conversation = Conversation((Turn("user", text), Turn("assistant", IMAGE)))
        size = nearest_ratio(task.image.height, task.image.width, self.sizes).size
        fitted = fit_inside(task.image.convert("RGB"), size)
        sampling = task.sampling or self.defaults.edit
        return Asked(
            self._picture(conversation, [to_tensor(fitted.image)], size, task.seed, sampling), fitted
        )

    def _picture(
        self, conversation: Conversation, images: list[Tensor], size: Size, seed: int, sampling: TokenSampling
    ) -> Request:
        """A request that is answered by one picture."""
        sizes = [SizedImage(size, False)] * (len(images) + 1)
        codes = {n: self._encode(image) for n, image in enumerate(images) if self._discrete_input}
        twin = unconditional(conversation, self._release_prompts)
        made = [
            self._prompt(given, sizes, images, shown, codes, self.vocabulary.size_tokens(size))
            for given, shown in (
                (conversation, tuple(range(len(sizes)))),
                (twin.conversation, twin.images),
            )
        ]
        layout = image_layout(size, self.vocabulary)
        return Request(made[0], layout=layout, unconditional=made[1], sampling=sampling, seed=seed)

    def _chat(self, task: Chat) -> Asked:
        turns, pictures = [], []
        for message in task.messages:
            turn, shown = _turn(message)
            turns.append(turn)
            pictures.extend(shown)
        if not turns or turns[-1].role != "user":
            raise ValueError("the last message must be the user's: there is nothing to answer")
        conversation = Conversation((*turns, Turn("assistant", "")))
        sizes, images, codes = self._pictures(conversation, pictures)
        every = tuple(range(len(sizes)))
        given = [
            self._prompt(version, sizes, images, every, codes)
            for version in (conversation, conversation.without_condition())
        ]
        sampling = task.sampling or self.defaults.chat
        request = Request(
            given[0],
            max_tokens=task.max_tokens,
            sizes=self.sizes,
            unconditional=given[1],
            sampling=sampling,
            seed=task.seed,
        )
        return Asked(request)

    def _pictures(
        self, conversation: Conversation, pictures: Sequence[Image.Image | MadeImage]
    ) -> tuple[list[SizedImage], list[Tensor], dict[int, Codes]]:
        """Sizes and pixels of a conversation's pictures, and codes of those that enter as such."""
        has_made = any(conversation.is_target)
        sizes, images, codes = [], [], {}
        for number, (picture, is_made) in enumerate(zip(pictures, conversation.is_target, strict=True)):
            if is_made and isinstance(picture, MadeImage):
                sizes.append(SizedImage(picture.size, False))
                images.append(torch.empty(0))
                codes[number] = picture.codes
                continue
            image = (picture.image if isinstance(picture, MadeImage) else picture).convert("RGB")
            size = (
                nearest_ratio(image.height, image.width, self.sizes).size
                if has_made
                else any_resolution(image.height, image.width, self.max_side)
            )
            fitted = (
                fit_inside(image, size).image
                if has_made
                else image.resize(size[::-1], Image.Resampling.BICUBIC)
            )
            sizes.append(SizedImage(size, not has_made))
            images.append(to_tensor(fitted))
            if is_made or self._discrete_input:
                codes[number] = self._encode(images[-1])
        return sizes, images, codes

    def _prompt(
        self,
        conversation: Conversation,
        sizes: Sequence[SizedImage],
        images: Sequence[Tensor],
        shown: Sequence[int],
        codes: Mapping[int, Codes],
        size_tokens: Sequence[int] = (),
    ) -> Prompt:
        pieces = prompt(conversation, self.tokenizer)
        sequence = token_sequence(pieces, sizes, self.vocabulary, codes.get, shown, self._discrete_input)
        return Prompt(
            ids=[*sequence.ids.tolist(), *size_tokens],
            slot_ids=[*sequence.slots.tolist(), *(0 for _ in size_tokens)],
            images=[images[cells.image] for cells in sequence.inputs],
            semantic_slots=[place for cells in sequence.inputs for place in cells.semantic.tolist()],
            pixel_slots=[place for cells in sequence.inputs for place in cells.pixel.tolist()],
        )


def to_tensor(image: Image.Image) -> Tensor:
    """RGB -> (1, 3, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image.convert("RGB")))
    return pixels.permute(2, 0, 1)[None].float() / 127.5 - 1


def _plain(text: str, name: str) -> str:
    """A user's words, which may hold anything but the signs that stand for pictures and sizes."""
    for sign in (IMAGE, RESOLUTION_TAG):
        if sign in text:
            raise ValueError(
                f"the {name} {text[:80]!r} holds {sign}, which stands for a picture here: write it differently"
            )
    if not text.strip():
        raise ValueError(f"the {name} is empty: say what to do")
    return text.strip()


def _turn(message: Mapping[str, Any]) -> tuple[Turn, list[Image.Image | MadeImage]]:
    """A turn with its pictures."""
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant"):
        raise ValueError(f"a message has the role {role!r}: use system, user or assistant")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    texts: list[str] = []
    images: list[Image.Image | MadeImage] = []
    words = ""  # since the last picture
    for item in content or ():
        image = item.get("image")
        if item.get("type") == "image" and isinstance(image, Image.Image | MadeImage):
            texts += [_typed(words), IMAGE]
            images.append(image)
            words = ""
        elif item.get("type") == "text" and isinstance(item.get("text"), str):
            words += item["text"]
        else:
            raise ValueError(
                f"a {role} message holds {item!r}: use text, or an image that is a PIL image or one made here"
            )
    texts = [text for text in (*texts, _typed(words)) if text]
    if not "".join(texts).strip():
        raise ValueError(f"a {role} message is empty: say something, or leave it out")
    return Turn(role, _lines(texts)), images


def _typed(text: str) -> str:
    """A user's words; what would stand for a picture or a size loses its brackets, however many there are."""
    return _SIGNS.sub(lambda found: found[0].strip("<{}>"), text)


def _lines(texts: Sequence[str]) -> str:
    """Pictures each on a line of their own, as in training."""
    lines = ""
    for text in texts:
        lines += text + "\n" if text == IMAGE else text
    return lines.removesuffix("\n") if texts[-1] == IMAGE else lines
