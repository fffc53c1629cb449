"""Answering a job's lines with a trained model: which seed and settings each has, and what is done already."""

import hashlib
import json
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from illume_lightning import __version__
from illume_lightning.lit.answers import Answer, failed, picture_names
from illume_lightning.lit.illume import DecoderName, Illume, Reply
from illume_lightning.lit.job_lines import Line, image_digests, to_task
from illume_lightning.lit.prompts import Defaults, Task
from illume_lightning.nn.token_sampling import TokenSampling, drawing_seed
from illume_lightning.resolution import Size

_PICTURE_KINDS = ("prompt", "instruction")


@dataclass(frozen=True)
class Drawing:
    """Changes to the model's sampling; none leaves a number as it is."""

    temperature: float | None = None
    """Of codes."""

    top_k: int | None = None
    """Of semantic codes; of pixel codes three times as many (official release)."""

    top_p: float | None = None
    """Of codes."""

    guidance: float | None = None
    """Scale of classifier-free guidance of codes."""

    text_temperature: float | None = None
    """Of words."""

    text_top_k: int | None = None
    """Of words."""

    text_top_p: float | None = None
    """Of words."""

    def defaults(self) -> Defaults:
        """The model's sampling of each task with these changes.

        Raises:
            ValueError: if a number is out of range.
        """
        given = Defaults()
        return Defaults(self._changed(given.generate), self._changed(given.edit), self._changed(given.chat))

    def _changed(self, sampling: TokenSampling) -> TokenSampling:
        codes = _given(temperature=self.temperature, top_p=self.top_p)
        text = _given(temperature=self.text_temperature, top_k=self.text_top_k, top_p=self.text_top_p)
        num_pixel = None if self.top_k is None else 3 * self.top_k
        return replace(
            sampling,
            text=replace(sampling.text, **text),
            semantic=replace(sampling.semantic, **codes, **_given(top_k=self.top_k)),
            pixel=replace(sampling.pixel, **codes, **_given(top_k=num_pixel)),
            **_given(guidance=self.guidance),
        )


@dataclass(frozen=True)
class Settings:
    """What decides the answers beside the lines and the model."""

    seed: int = 0
    """Gives each line that has none a seed, by its id."""

    size: Size | None = None
    """Height and width of pictures where the line has none; by default the model's square."""

    decoder: DecoderName = "dualvitok"
    """What makes the pictures."""

    max_tokens: int = 512
    """Most tokens of an answer in words."""

    def seed_of(self, line: Line) -> int:
        """Seed of a line: its own, or one of 32 bits that follows from ``seed`` and its id."""
        if "seed" in line.task:
            return int(line.task["seed"])
        return drawing_seed(self.seed, line.id)


class Worker:
    """Answers lines with a model.

    Args:
        illume: the model.
        settings: of the job.
        images: folder that names of images are relative to.
    """

    def __init__(self, illume: Illume, settings: Settings, images: Path) -> None:
        self.illume, self.settings, self.images = illume, settings, images
        parameter = next(illume.mllm.parameters())
        self._made_by = {
            "illume-lightning": __version__,
            "torch": str(torch.__version__),
            "device": parameter.device.type,
        }
        self._model: dict[str, Any] = {
            "decoder": settings.decoder,
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "mllm": _fingerprint(illume.mllm),
            "tokenizer": _fingerprint(illume.tokenizer),
        }
        if settings.decoder == "diffusion" and illume.diffusion_decoder is not None:
            self._model["diffusion_decoder"] = _fingerprint(illume.diffusion_decoder)
            self._model["diffusion"] = asdict(illume.diffusion_decoder.sampling)

    def unfinished(self, lines: Sequence[Line], finished: Mapping[str, Mapping[str, Any]]) -> list[Line]:
        """Lines that have no answer yet.

        Args:
            lines: of the job.
            finished: records of the answers that are there, by id.

        Raises:
            ValueError: if one of those was made from another line or with other settings; says which.
        """
        todo = []
        for line in lines:
            record = None if line.error else finished.get(line.id)
            try:
                settings = {} if record is None else self._settings(line)
            except ValueError:  # an image is gone: to be reported
                record = None
            if record is None:
                todo.append(line)
                continue
            wanted = json.loads(json.dumps({**settings, "task": line.task}))
            found = {**record["settings"], "task": record["task"]}
            if key := next((key for key in {**wanted, **found} if wanted.get(key) != found.get(key)), None):
                raise ValueError(
                    f"the answer {line.id!r} is there already, made with other settings ({key} was "
                    f"{str(found.get(key))[:80]}, is now {str(wanted.get(key))[:80]}): choose another folder"
                )
        return todo

    def work(self, lines: Sequence[Line]) -> Iterator[Answer]:
        """Answer lines side by side, in the order in which they are done; lines with errors are told as such.

        Raises:
            ValueError: if there are pictures to make and no tokenizer.
        """
        if self.illume.tokenizer is None and any(
            kind in line.task for line in lines for kind in _PICTURE_KINDS
        ):
            raise ValueError(
                "this model can't make pictures: its run names no tokenizer; give the DualViTok whose codes it was "
                "trained on with --tokenizer (in `illume predict`: --model.tokenizer)"
            )
        refused: deque[Answer] = deque()
        started: dict[int, tuple[Line, dict[str, Any], float]] = {}

        def tasks() -> Iterator[Task]:
            number = 0
            for line in lines:
                try:
                    task, settings = self._task(line), self._settings(line)
                except ValueError as error:
                    refused.append(failed(line, str(error)))
                    continue
                started[number] = line, settings, time.perf_counter()
                number += 1
                yield task

        for event in self.illume.run(tasks(), self.settings.decoder):
            while refused:
                yield refused.popleft()
            if event.reply is not None:
                line, settings, start = started.pop(event.number)
                yield self._answer(line, settings, event.reply, time.perf_counter() - start)
        yield from refused

    def _task(self, line: Line) -> Task:
        """The task of a line, which the model can work on."""
        if line.error:
            raise ValueError(line.error)
        settings = self.settings
        task = to_task(line.task, self.images, settings.seed_of(line), settings.size, settings.max_tokens)
        self.illume.check(task, settings.decoder)
        return task

    def _answer(self, line: Line, settings: dict[str, Any], reply: Reply, seconds: float) -> Answer:
        record = {
            "id": line.id,
            "place": line.place,
            "task": line.task,
            "text": reply.text,
            "pictures": picture_names(line.id, len(reply.images)),
            "settings": settings,
            "made_by": self._made_by,
            "seconds": round(seconds, 3),
        }
        return Answer(record, reply.images)

    def _settings(self, line: Line) -> dict[str, Any]:
        """All that decides the answer beside the line's own words."""
        defaults = self.illume.prompts.defaults
        settings: dict[str, Any] = {"seed": self.settings.seed_of(line)}
        if "prompt" in line.task:
            settings["size"] = line.task.get("size") or list(
                self.settings.size or self.illume.prompts.sizes[0]
            )
            sampling = defaults.generate
        elif "instruction" in line.task:
            sampling = defaults.edit
        else:
            settings["max_tokens"] = self.settings.max_tokens
            sampling = defaults.chat
        return {
            **settings,
            **asdict(sampling),
            "images": image_digests(line.task, self.images),
            **self._model,
        }


def _given(**numbers: Any) -> dict[str, Any]:
    return {name: number for name, number in numbers.items() if number is not None}


def _fingerprint(network: nn.Module | None) -> str | None:
    """Hash of up to 1,024 numbers of every tensor; a training step changes nearly all there are."""
    if network is None:
        return None
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        flat = value.detach().flatten()
        sample = flat[:: max(1, len(flat) // 1024)].cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
