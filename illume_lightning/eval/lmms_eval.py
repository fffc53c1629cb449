"""A trained MLLM under lmms-eval: ``lmms-eval --model illume_lightning --model_args pretrained=RUN --tasks ...``.

Written for lmms-eval 0.7.3, whose base class and registry it uses; the official release's adapter is for 0.3.0.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from illume_lightning.data.conversation import IMAGE
from illume_lightning.lit.illume import Illume
from illume_lightning.lit.prompts import Chat
from illume_lightning.nn.generation import Prompt
from illume_lightning.nn.token_sampling import SegmentSampling, TokenSampling

try:
    from lmms_eval.api.model import lmms
except ImportError as error:
    raise ImportError("this needs lmms-eval: pip install 'illume-lightning[eval]'") from error

FILLER = "\n\n"
"""What lmms-eval puts into ``until`` where a task names no end: the gap between examples, and no end of an answer."""


class IllumeLmms(lmms):
    """Answers in words: no picture may come, so none costs time.

    Pictures of a request stand where its text has ``<image>``; where it has none, or another number of them, they
    stand first, each on a line of its own (official release).

    Args:
        pretrained: folder of an MLLM run, one of its checkpoints, or a published folder.
        tokenizer: DualViTok run or file; only for published folders that have no vision tower.
        batch_size: requests that are worked on side by side; as one ends, the next takes its place.
        device: such as cuda:1; ``auto`` gives every process of ``accelerate launch`` its own.
        dtype: of the language model: float32, bfloat16 or float16.
        max_side: square root of the largest area of pictures, in pixels; by default the model's.
        max_new_tokens: of answers whose task names none.
        context: most tokens of a request with its answer.
        max_batch_size: not used; lmms-eval gives it.

    Raises:
        ValueError: if a number or a type is none.
    """

    def __init__(
        self,
        pretrained: str,
        tokenizer: str | None = None,
        batch_size: int | str = 1,
        device: str = "auto",
        dtype: str = "bfloat16",
        max_side: int | None = None,
        max_new_tokens: int = 1024,
        context: int = 8192,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or not int(batch_size):
            raise ValueError(f"batch_size is {batch_size!r}: give a number of requests")
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype is {dtype!r}: choose float32, bfloat16 or float16")
        self.batch_size, self.max_new_tokens = int(batch_size), max_new_tokens
        options: dict[str, Any] = {"sizes": (), "slots": max(2, self.batch_size), "context": context}
        options |= {} if max_side is None else {"max_side": max_side}
        place = _own_device() if device == "auto" else device
        self.illume = Illume.load(pretrained, tokenizer, device=place, dtype=getattr(torch, dtype), **options)

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return self.illume.engine.device

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers in the order of the requests; greedy, unless a task asks for a temperature.

        Raises:
            ValueError: if a request has other media than pictures, asks for beams, or doesn't fit the context.
        """
        answers = [""] * len(requests)
        bar = tqdm(total=len(requests), disable=self.rank != 0, desc="Answers")
        for number, text, _, reply in self.illume.run(self._chats(requests)):
            context, settings = requests[number].args[:2]
            answers[number] += text
            if reply is not None:
                answers[number] = _cut(reply.text, settings)
                self.cache_hook.add_partial("generate_until", (context, settings), answers[number])
                bar.update()
            elif _cut(answers[number], settings) != answers[number].strip():
                self.illume.cancel(number)
        bar.close()
        return answers

    @torch.no_grad()
    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation as the assistant's answer, and whether each token is the likeliest.

        The chat format has no space between question and answer, so that of the continuation is left out; its end
        of turn does not count.
        """
        found: list[tuple[float, bool]] = []
        for start in tqdm(range(0, len(requests), self.batch_size), disable=self.rank != 0, desc="Answers"):
            chosen = requests[start : start + self.batch_size]
            found += self._score([self._continued(request) for request in chosen])
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not there.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "tasks of several rounds are not supported: each makes its next prompt and pictures of the answers so far "
            "by a protocol of its own; leave such tasks out"
        )

    def _chats(self, requests: Sequence[Any]) -> Iterator[Chat]:
        """Pictures are read when a request's turn comes."""
        for request in requests:
            context, settings, *where = request.args
            message = {"role": "user", "content": _content(context, self._visuals(*where))}
            limit = int(settings.get("max_new_tokens") or self.max_new_tokens)
            yield Chat([message], sampling=_sampling(settings), max_tokens=limit)

    def _visuals(self, doc_to_visual: Any, doc_id: Any, task: str, split: str) -> Sequence[Any]:
        return doc_to_visual(self.task_dict[task][split][doc_id]) or ()

    def _continued(self, request: Any) -> tuple[Prompt, list[int]]:
        """A question's sequence, and the ids to score behind it."""
        context, target, *where = request.args
        if not isinstance(target, str):
            _, doc_id, task, split = where
            target = target(self.task_dict[task][split][doc_id])
        message = {"role": "user", "content": _content(context, self._visuals(*where) if where else ())}
        asked = self.illume.prompts.ask(Chat([message]))
        return asked.request.prompt, self.illume.text_tokenizer.encode(str(target).lstrip())

    def _score(self, batch: Sequence[tuple[Prompt, list[int]]]) -> list[tuple[float, bool]]:
        mllm, device = self.illume.mllm, self.device
        length = max(len(prompt.ids) + len(ids) for prompt, ids in batch)
        ids = torch.zeros(len(batch), length, dtype=torch.long)
        slot_ids, documents = torch.zeros_like(ids), torch.full_like(ids, -1)
        semantic: list[int] = []
        pixel: list[int] = []
        for row, (prompt, target) in enumerate(batch):
            whole = [*prompt.ids, *target]
            ids[row, : len(whole)] = torch.tensor(whole)
            slot_ids[row, : len(prompt.ids)] = torch.tensor(prompt.slot_ids)
            documents[row, : len(whole)] = row
            semantic += [row * length + place for place in prompt.semantic_slots]
            pixel += [row * length + place for place in prompt.pixel_slots]
        images = [image.to(device) for prompt, _ in batch for image in prompt.images]
        slots = [torch.tensor(places, dtype=torch.long, device=device) for places in (semantic, pixel)]
        embeds = mllm.embed(ids.to(device), images, slots[0], slots[1], slot_ids.to(device))
        positions = torch.arange(length, device=device).expand(len(batch), -1)
        hidden = mllm.hidden(embeds, positions, documents.to(device))
        found = []
        for row, (prompt, target) in enumerate(batch):
            start, wanted = len(prompt.ids) - 1, torch.tensor(target, dtype=torch.long, device=device)
            scores = mllm.head.logits(hidden[row, start : start + len(target)]).float().log_softmax(-1)
            total = scores.gather(-1, wanted[:, None]).sum().item()
            found.append((total, bool((scores.argmax(-1) == wanted).all())))
        return found


def _own_device() -> str:
    from accelerate import PartialState

    return str(PartialState().device)


def _content(context: str, visuals: Sequence[Any]) -> list[dict[str, Any]]:
    """A user's message: pictures at their placeholders, or before the text."""
    for visual in visuals:
        if not isinstance(visual, Image.Image):
            raise ValueError(
                f"a request holds {type(visual).__name__} {str(visual)[:80]!r}: only pictures are read"
            )
    texts = context.split(IMAGE)
    if len(texts) != len(visuals) + 1:
        texts = [""] * len(visuals) + ["".join(texts)]
    content: list[dict[str, Any]] = [{"type": "text", "text": texts[0]}] if texts[0] else []
    for visual, text in zip(visuals, texts[1:], strict=True):
        content.append({"type": "image", "image": visual})
        # A picture ends its line.
        if text := text.removeprefix("\n"):
            content.append({"type": "text", "text": text})
    return content


def _sampling(settings: Mapping[str, Any]) -> TokenSampling:
    if int(settings.get("num_beams") or 1) > 1:
        raise ValueError(f"a task asks for {settings['num_beams']} beams: give --gen_kwargs num_beams=1")
    temperature = float(settings.get("temperature") or 0)
    if settings.get("do_sample") is False or temperature == 0:
        return TokenSampling(guidance=1)
    top_k, top_p = int(settings.get("top_k") or 0), float(settings.get("top_p") or 1)
    return TokenSampling(text=SegmentSampling(temperature, top_k, top_p), guidance=1)


def _cut(text: str, settings: Mapping[str, Any]) -> str:
    """An answer up to the first of the task's ends."""
    until = settings.get("until") or ()
    text = text.strip()
    for end in (until,) if isinstance(until, str) else until:
        if end and end != FILLER:
            text = text.partition(end)[0]
    return text
