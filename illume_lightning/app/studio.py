"""What the page does with a model: one job at a time for all users, each of which can be stopped."""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, get_args

from PIL import Image

from illume_lightning.app.history import History, check_length
from illume_lightning.data.image import Dropped, Limits, canonical, decode
from illume_lightning.lit.illume import DecoderName, Event, Illume
from illume_lightning.lit.prompts import Chat, Edit, Generate, Task
from illume_lightning.nn.token_sampling import TokenSampling
from illume_lightning.resolution import Size

MAX_PIXELS = 50_000_000
"""Of an uploaded picture; a small file can hold more than the memory."""


class Pictures(NamedTuple):
    """What there is of the pictures that were asked for.

    Args:
        made: finished ones with their seeds, in the order of these.
        share: of the whole work, 0 to 1.
    """

    made: list[tuple[int, Image.Image]]
    share: float


class Studio:
    """A model that several users share.

    All jobs are iterators. Their first news comes before any work; closing one stops it, and the model is free for
    the next.

    Args:
        illume: the model; touched by one job at a time.
    """

    def __init__(self, illume: Illume) -> None:
        self.illume = illume
        self._is_free = threading.Lock()

    @property
    def decoders(self) -> tuple[DecoderName, ...]:
        """What can make pictures of codes; nothing can without a tokenizer."""
        parts = {"dualvitok": self.illume.tokenizer, "diffusion": self.illume.diffusion_decoder}
        return tuple(name for name in get_args(DecoderName) if parts[name] is not None)

    def generate(
        self,
        prompt: str,
        size: Size,
        count: int,
        seed: int,
        sampling: TokenSampling,
        decoder: DecoderName = "dualvitok",
    ) -> Iterator[Pictures]:
        """Make pictures of a prompt, with seeds that follow one another.

        Raises:
            ValueError: as ``Illume.check``, or if the prompt is too long.
        """
        check_length(prompt)
        return self._make([Generate(prompt, size, seed + n, sampling) for n in range(count)], decoder)

    def edit(
        self,
        image: Image.Image,
        instruction: str,
        seed: int,
        sampling: TokenSampling,
        decoder: DecoderName = "dualvitok",
    ) -> Iterator[Pictures]:
        """Change a picture; the result has its size.

        Raises:
            ValueError: as ``Illume.check``, or if the instruction is too long.
        """
        check_length(instruction)
        return self._make([Edit(image, instruction, seed, sampling)], decoder)

    def reconstruct(self, image: Image.Image) -> Iterator[dict[DecoderName, Image.Image]]:
        """A picture through codes and back, by one decoder after the other."""
        results: dict[DecoderName, Image.Image] = {}
        yield results
        for decoder in self.decoders:
            with self._is_free:
                results = results | {decoder: self.illume.reconstruct([image], decoder)[0]}
            yield results

    def answer(
        self,
        history: History,
        seed: int,
        sampling: TokenSampling,
        max_tokens: int,
        decoder: DecoderName = "dualvitok",
    ) -> Iterator[float]:
        """Answer the last question of a history, which takes the answer up as it grows.

        Yields:
            The share of the picture under way that is there, 0 to 1.

        Raises:
            ValueError: as ``Illume.check``.
        """
        exchange, text = history.exchanges[-1], ""
        chat = Chat(history.messages, seed + exchange.attempts, sampling, max_tokens)
        history.is_growing = True
        try:
            yield 0.0
            for event in self._work([chat], decoder):
                text += event.text
                exchange.answer = (text,) if text.strip() else ()
                if event.reply is not None:
                    exchange.answer = event.reply.parts
                yield event.picture
        finally:
            history.is_growing = False

    def _make(self, tasks: Sequence[Task], decoder: DecoderName) -> Iterator[Pictures]:
        made: dict[int, Image.Image] = {}
        shares = [0.0] * len(tasks)
        yield Pictures([], 0.0)
        for event in self._work(tasks, decoder):
            shares[event.number] = event.picture
            if event.reply is not None:
                shares[event.number] = 1.0
                made[event.number] = event.reply.images[0]
            finished = [(tasks[number].seed, made[number]) for number in sorted(made)]
            yield Pictures(finished, sum(shares) / len(tasks))

    def _work(self, tasks: Sequence[Task], decoder: DecoderName) -> Iterator[Event]:
        for task in tasks:
            self.illume.check(task, decoder)
        with self._is_free:
            yield from self.illume.run(tasks, decoder)


def read_picture(path: str | Path) -> Image.Image:
    """An uploaded picture: RGB, upright, transparency on white.

    Raises:
        ValueError: if it can't be used; says why, without the path.
    """
    image = canonical(Path(path).read_bytes(), Limits(max_pixels=MAX_PIXELS))
    if isinstance(image, Dropped):
        raise ValueError(
            f"the picture can't be used: {image.reason}; give a JPEG, PNG or WebP of at most "
            f"{MAX_PIXELS // 10**6} megapixels"
        )
    return Image.fromarray(decode(image.data))
