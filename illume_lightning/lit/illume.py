"""The trained model in one object: understand, generate, edit, chat and reconstruct; PIL in and out."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from illume_lightning.data.geometry import fit_inside, restore
from illume_lightning.data.schedule import Phase
from illume_lightning.data.text_tokenizer import TextTokenizer
from illume_lightning.data.token_sequence import Codes
from illume_lightning.image_layout import image_layout
from illume_lightning.lit.device import choose_device
from illume_lightning.lit.diffusion_decoder import DiffusionDecoderModule
from illume_lightning.lit.dualvitok import to_uint8
from illume_lightning.lit.parts import load_decoders, load_published, load_run
from illume_lightning.lit.prompts import (
    Asked,
    Chat,
    Defaults,
    Edit,
    Generate,
    MadeImage,
    Prompts,
    Task,
    to_tensor,
)
from illume_lightning.lit.reply import Event, Reply
from illume_lightning.lit.saved_run import SavedRun
from illume_lightning.lit.tokenizer import check_maker
from illume_lightning.nn.diffusion_decoder import SCALE
from illume_lightning.nn.dualvitok import DualCodes, DualViTok
from illume_lightning.nn.generation import Engine, Request
from illume_lightning.nn.mllm import MLLM
from illume_lightning.nn.pixel import PixelEncoder
from illume_lightning.nn.semantic import QwenVisionTower
from illume_lightning.nn.token_sampling import TokenSampling
from illume_lightning.resolution import Size, decoder_size_index, nearest_ratio, ratio_sizes

DecoderName = Literal["dualvitok", "diffusion"]


class Illume:
    """A trained MLLM with what it needs to read text and to show pictures.

    Args:
        mllm: the language model, on its device.
        text_tokenizer: of text.
        tokenizer: makes pictures of codes; without it there are answers in words only. Models with discrete input
            also need it to look at pictures.
        diffusion_decoder: makes pictures of codes too, twice as large.
        sizes: heights and widths of pictures that the model was trained to make; the first is the default.
        max_side: square root of the largest area of pictures to look at, in pixels; larger ones are scaled down.
        defaults: sampling of each task.
        release_prompts: the official release's unconditional prompts, for models that were trained on them.
        slots: sequences that run side by side; a guided answer takes two.
        context: most tokens of a conversation with its answer.
        pack: as ``Engine``.
    """

    def __init__(
        self,
        mllm: MLLM,
        text_tokenizer: TextTokenizer,
        tokenizer: DualViTok | None = None,
        diffusion_decoder: DiffusionDecoderModule | None = None,
        sizes: Sequence[Size] = ratio_sizes(512, 64),
        max_side: int = 1024,
        defaults: Defaults = Defaults(),
        release_prompts: bool = False,
        slots: int = 16,
        context: int = 4096,
        pack: bool = True,
    ) -> None:
        self.mllm, self.text_tokenizer = mllm, text_tokenizer
        self.tokenizer, self.diffusion_decoder = tokenizer, diffusion_decoder
        self.prompts = Prompts(
            mllm.vocabulary,
            text_tokenizer,
            sizes,
            max_side,
            self._codes,
            defaults,
            release_prompts,
            mllm.discrete_input,
        )
        ends = text_tokenizer.end_of_turn, text_tokenizer.end_of_text
        self.engine = Engine(mllm, ends, slots, context, pack)

    @classmethod
    def load(cls, model: str | Path, *parts: Any, **options: Any) -> "Illume":
        """``from_official`` for a folder with a ``config.json``, ``from_run`` for what ``illume fit`` trained."""
        is_published = (Path(model) / "config.json").is_file()
        return (cls.from_official if is_published else cls.from_run)(model, *parts, **options)

    @classmethod
    def from_run(
        cls,
        run: str | Path,
        tokenizer: str | Path | None = None,
        diffusion_decoder: str | Path | None = None,
        device: str = "auto",
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> "Illume":
        """Load what ``illume fit`` trained.

        Args:
            run: folder of an MLLM run, or one of its checkpoints.
            tokenizer: DualViTok run, checkpoint or published file; by default the one that the run names, if any.
            diffusion_decoder: run, checkpoint or published folder.
            device: ``auto`` takes the first accelerator there is.
            dtype: of the language model.
            options: of ``Illume``, instead of those that follow from the run.

        Raises:
            FileNotFoundError: if something is missing; names it.
            ValueError: if the parts don't belong together.
        """
        saved = SavedRun(run)
        mllm = load_run(saved).to(choose_device(device), dtype)
        tokenizer = tokenizer or saved.section("model", "init_args", "tokenizer")
        parts = load_decoders(tokenizer, diffusion_decoder, choose_device(device))
        if parts[0] is not None:
            check_maker(saved.checkpoint, parts[0])
        phase = Phase(**saved.section("curriculum", "phases")[-1])
        data = saved.section("data", "init_args")
        given = {**sizes_of(phase), "release_prompts": bool(data.get("release_prompts"))}
        text_tokenizer = TextTokenizer(data["text_tokenizer"])
        return cls(mllm, text_tokenizer, *parts, **(given | options))

    @classmethod
    def from_official(
        cls,
        folder: str | Path,
        tokenizer: str | Path | None = None,
        diffusion_decoder: str | Path | None = None,
        device: str = "auto",
        dtype: torch.dtype = torch.float32,
        towers: tuple[QwenVisionTower, PixelEncoder] | None = None,
        **options: Any,
    ) -> "Illume":
        """Load a published MLLM in origin format, or a folder of ``illume export``.

        Args:
            folder: ``config.json``, safetensors and the ``tokenizer.json`` that knows the vision tokens.
            tokenizer: as ``from_run``. Published checkpoints whose vision tower was frozen have none; then its
                weights are the tokenizer's.
            diffusion_decoder: as ``from_run``.
            device: as ``from_run``.
            dtype: of the language model; bfloat16 is the release's.
            towers: of the model's sizes; by default the tokenizer's, without one full-size.
            options: of ``Illume``, instead of the folder's or else the release's.

        Raises:
            FileNotFoundError: if something is missing; names it.
            ValueError: if the parts don't belong together.
        """
        parts = load_decoders(tokenizer, diffusion_decoder, choose_device(device))
        mllm, given = load_published(folder, parts[0], towers, choose_device(device), dtype)
        return cls(mllm, TextTokenizer(folder), *parts, **(given | options))

    def run(self, tasks: Iterable[Task], decoder: DecoderName = "dualvitok") -> Iterator[Event]:
        """Work on tasks of any kinds side by side; read one by one as places become free.

        Closing the iterator stops everything; ``cancel`` stops one task.

        Args:
            tasks: to work on.
            decoder: what makes the pictures.

        Raises:
            ValueError: if a task can't be worked on; says why. Check with ``check`` what should not stop the others.
        """
        self._check_decoder(decoder)
        asked: dict[int, tuple[Task, Asked]] = {}
        ids: defaultdict[int, list[int]] = defaultdict(list)
        told: defaultdict[int, str] = defaultdict(str)
        for update in self.engine.run(self._requests(tasks, asked, decoder)):
            number = update.number
            ids[number] += update.ids
            if update.picture:
                yield Event(number, "", update.picture, None)
                continue
            text = self._words(ids[number])
            if update.is_finished:
                task, question = asked.pop(number)
                reply = self._reply(ids.pop(number), question, task.seed, decoder)
                yield Event(number, text[len(told.pop(number, "")) :], 0.0, reply)
            else:
                # Bytes of a character may be divided among tokens.
                text = text.rstrip("\ufffd")
                yield Event(number, text[len(told[number]) :], 0.0, None)
                told[number] = text

    def cancel(self, number: int) -> None:
        """Stop one of the tasks of ``run``; its reply comes with the next step, without unfinished pictures."""
        self.engine.cancel(number)

    def check(self, task: Task, decoder: DecoderName = "dualvitok") -> None:
        """Refuse what can't be worked on, before any work.

        Args:
            task: to work on.
            decoder: what is to make the pictures.

        Raises:
            ValueError: says why.
        """
        self._ask(task, decoder)

    def _requests(
        self, tasks: Iterable[Task], asked: dict[int, tuple[Task, Asked]], decoder: DecoderName
    ) -> Iterator[Request]:
        for number, task in enumerate(tasks):
            asked[number] = task, self._ask(task, decoder)
            yield asked[number][1].request

    def _ask(self, task: Task, decoder: DecoderName) -> Asked:
        """The request of a task, checked; without a tokenizer no pictures come within the text."""
        self._check_decoder(decoder)
        asked = self.prompts.ask(task)
        if self.tokenizer is None:
            asked = asked._replace(request=replace(asked.request, sizes=()))
        request = asked.request
        self.engine.check(request)
        if self.tokenizer is None and not isinstance(task, Chat):
            raise ValueError(
                "pictures need a tokenizer: give the DualViTok run whose codes the model was trained on"
            )
        if decoder == "diffusion":
            assert self.diffusion_decoder is not None
            model, layout = self.diffusion_decoder.model, request.layout
            for height, width in request.sizes if layout is None else [(layout.height, layout.width)]:
                decoder_size_index((SCALE * height, SCALE * width), model.sizes, model.transposed_sizes)
        return asked

    # -- one kind of task ------------------------------------------------------------------------------------

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        seed: int = 0,
        sampling: TokenSampling | None = None,
        max_tokens: int = 512,
        decoder: DecoderName = "dualvitok",
    ) -> Reply:
        """Answer the last message of a conversation; arguments as ``Chat``. Go on with ``reply.message``."""
        return self._all([Chat(messages, seed, sampling, max_tokens)], decoder)[0]

    def generate(
        self,
        prompts: str | Sequence[str],
        size: Size | None = None,
        seeds: Sequence[int] | None = None,
        sampling: TokenSampling | None = None,
        decoder: DecoderName = "dualvitok",
    ) -> list[Image.Image]:
        """Make a picture of each prompt.

        Args:
            prompts: what the pictures show.
            size: height and width in pixels, of any that has tokens; by default the model's square.
            seeds: one for each prompt, by default 0, 1, 2 and so on.
            sampling: by default the model's for pictures.
            decoder: ``diffusion`` makes pictures of twice the size.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        numbers = range(len(prompts)) if seeds is None else seeds
        tasks = [Generate(text, size, seed, sampling) for text, seed in zip(prompts, numbers, strict=True)]
        return [reply.images[0] for reply in self._all(tasks, decoder)]

    def edit(
        self,
        images: Image.Image | Sequence[Image.Image],
        instructions: str | Sequence[str],
        seeds: Sequence[int] | None = None,
        sampling: TokenSampling | None = None,
        decoder: DecoderName = "dualvitok",
    ) -> list[Image.Image]:
        """Change each picture by its instruction; results have the pictures' own sizes. As ``generate``."""
        images = [images] if isinstance(images, Image.Image) else images
        instructions = [instructions] if isinstance(instructions, str) else instructions
        numbers = range(len(images)) if seeds is None else seeds
        triples = zip(images, instructions, numbers, strict=True)
        return [
            reply.images[0] for reply in self._all([Edit(*triple, sampling) for triple in triples], decoder)
        ]

    def reconstruct(
        self, images: Sequence[Image.Image], decoder: DecoderName = "dualvitok"
    ) -> list[Image.Image]:
        """Pictures through codes and back, each at the nearest size of the model's, returned at its own."""
        self._check_decoder(decoder)
        results = []
        for image in images:
            size = nearest_ratio(image.height, image.width, self.prompts.sizes).size
            fitted = fit_inside(image.convert("RGB"), size)
            codes = self._codes(to_tensor(fitted.image))
            results.append(restore(self._pictures([codes], size, [0], decoder)[0], fitted))
        return results

    def _all(self, tasks: Sequence[Task], decoder: DecoderName) -> list[Reply]:
        replies = {event.number: event.reply for event in self.run(tasks, decoder) if event.reply is not None}
        return [replies[number] for number in range(len(tasks))]

    # -- answers ---------------------------------------------------------------------------------------------

    def _words(self, ids: Sequence[int]) -> str:
        return self.text_tokenizer.decode([id for id in ids if id < self.mllm.vocabulary.num_text])

    def _reply(self, ids: list[int], asked: Asked, seed: int, decoder: DecoderName) -> Reply:
        """The answer's texts and pictures in order; a picture that was cancelled is left out."""
        vocabulary, only = self.mllm.vocabulary, asked.request.layout
        parts: list[str | MadeImage] = []
        while ids:
            start = ids.index(vocabulary.start_of_image) if vocabulary.start_of_image in ids else len(ids)
            if words := self._words(ids[:start]):
                parts.append(words)
            if start == len(ids):
                break
            size = (only.height, only.width) if only else vocabulary.size_of(ids[start - 2], ids[start - 1])
            layout = only or image_layout(size, vocabulary)
            picture, ids = ids[start : start + layout.length], ids[start + layout.length :]
            if len(picture) == layout.length:
                semantic, pixel = layout.codes(picture)
                codes = np.array(semantic), np.array(pixel)
                image = self._pictures([codes], size, [seed], decoder)[0]
                image = image if asked.fitted is None else restore(image, asked.fitted)
                parts.append(MadeImage(image, codes, size))
        return Reply(tuple(parts))

    def _pictures(
        self, codes: Sequence[Codes], size: Size, seeds: Sequence[int], decoder: DecoderName
    ) -> list[Image.Image]:
        """Pictures of codes of one size."""
        assert self.tokenizer is not None
        device = next(self.tokenizer.parameters()).device
        layout = image_layout(size, self.mllm.vocabulary)
        grids = [
            torch.from_numpy(np.stack(branch)).view(-1, *grid).to(device)
            for branch, grid in zip(zip(*codes, strict=True), layout.grids, strict=True)
        ]
        with torch.no_grad():
            if decoder == "diffusion":
                assert self.diffusion_decoder is not None
                made = self.diffusion_decoder.decode(DualCodes(*grids), seeds)
            else:
                made = self.tokenizer.decode_codes(DualCodes(*grids))
        return [Image.fromarray(picture) for picture in to_uint8(made).permute(0, 2, 3, 1).cpu().numpy()]

    @torch.no_grad()
    def _codes(self, images: Tensor) -> Codes:
        """Codes of a picture (1, 3, H, W) in [-1, 1]."""
        if self.tokenizer is None:
            raise ValueError("pictures that enter as codes need a tokenizer: give the DualViTok run")
        codes = self.tokenizer.encode(images.to(next(self.tokenizer.parameters()).device)).codes
        assert codes.semantic is not None and codes.pixel is not None
        return codes.semantic.flatten().cpu().numpy(), codes.pixel.flatten().cpu().numpy()

    def _check_decoder(self, decoder: DecoderName) -> None:
        if decoder == "diffusion" and self.diffusion_decoder is None:
            raise ValueError("there is no diffusion decoder: give the run of one, or use decoder 'dualvitok'")
        if decoder not in ("dualvitok", "diffusion"):
            raise ValueError(f"decoder is {decoder!r}: use 'dualvitok' or 'diffusion'")


def sizes_of(phase: Phase) -> dict[str, Any]:
    """Options of ``Illume`` that follow from the last phase of training: sizes to make, and to look at."""
    making = phase.generating
    is_square = making.mode == "fixed"
    sizes = [(making.side, making.side)] if is_square else ratio_sizes(making.side, making.size_step)
    return {"sizes": sizes, "max_side": phase.side}
