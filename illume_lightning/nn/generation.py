"""One engine for all that the MLLM writes: answers in words, pictures, edits, in one batch (paper 3.2).

Every answer follows its own grammar, so a batch mixes tasks and sizes. A guided answer has two sequences, one with
and one without the condition, that run side by side. Tokens that must come ride along with the next pass, and the
head is computed only for ids that may come. What an answer is does not depend on its neighbours.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from illume_lightning.grammar import Grammar
from illume_lightning.nn.answer import Answer, Prompt, Request, Update, without_last
from illume_lightning.nn.decoding import decoding
from illume_lightning.nn.key_value_cache import KeyValueCache
from illume_lightning.nn.matmul import PackedProducts
from illume_lightning.nn.mllm import MLLM
from illume_lightning.nn.token_sampling import draw, guide

__all__ = ["Engine", "Prompt", "Request", "Update"]

K = TypeVar("K", bound=Hashable)


class Engine:
    """Writes answers to a queue of requests; as soon as one is finished, the next takes its place.

    Args:
        mllm: the model, on its device; put into evaluation mode.
        end_ids: ids that end an answer in words.
        slots: sequences that run side by side; a guided answer takes two.
        context: most tokens of a prompt with its answer.
        pack: on a CPU keep a second copy of the weights, in the order in which it reads them fastest.

    Raises:
        ValueError: if there are too few slots for a guided answer, or the trunk was not made for such a context.
    """

    def __init__(
        self, mllm: MLLM, end_ids: Sequence[int], slots: int = 16, context: int = 4096, pack: bool = True
    ) -> None:
        longest = mllm.trunk.config.max_position_embeddings
        if slots < 2:
            raise ValueError(f"{slots} slots: a guided answer takes 2; give at least so many")
        if not 1 < context <= longest:
            raise ValueError(f"a context of {context:,} tokens: the language model takes 2 to {longest:,}")
        self.mllm, self.end_ids = mllm.eval(), frozenset(end_ids)
        self.cache = KeyValueCache(mllm.trunk.config, slots, context)
        self._multiply = PackedProducts(pack)
        self._answers: list[Answer] = []
        self._cancelled: set[int] = set()
        self._mask = lru_cache(maxsize=64)(self._make_mask)

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return self.mllm.embedding.text.device

    def check(self, request: Request) -> None:
        """Refuse what can't be answered.

        Raises:
            ValueError: if the prompt is empty, it and its answer don't fit the context, a size of pictures has no
                tokens, or a guided picture's two prompts end differently.
        """
        prompts = [request.prompt, *([request.unconditional] if request.unconditional else [])]
        if not all(len(prompt.ids) for prompt in prompts):
            raise ValueError("the prompt is empty: there is nothing to answer")
        length, context = max(len(prompt.ids) for prompt in prompts), self.cache.context
        if request.budget < 1 or length + request.budget > context:
            raise ValueError(
                f"a prompt of {length:,} tokens and an answer of up to {request.budget:,} don't fit a context of "
                f"{context:,}: shorten the prompt, give it smaller or fewer pictures, or change max_tokens or context"
            )
        Grammar(self.mllm.vocabulary, request.layout, request.sizes)
        # Both sequences are fed the same tokens from the prompt's last on.
        if request.layout is not None and len({prompt.ids[-1] for prompt in prompts}) > 1:
            raise ValueError(
                f"the prompt ends with id {prompts[0].ids[-1]}, the one without its condition with "
                f"{prompts[1].ids[-1]}: end both with the size of the picture"
            )

    def cancel(self, number: int) -> None:
        """Stop a request; its last update comes with the next step."""
        self._cancelled.add(number)

    @torch.no_grad()
    def run(self, requests: Iterable[Request]) -> Iterator[Update]:
        """Answer requests, read one by one as places become free.

        Closing the iterator stops everything.

        Raises:
            ValueError: as ``check``, before any work is done for that request.
        """
        self._answers = []
        queue = _Queue(requests)
        try:
            while True:
                # Not around the loop: between updates the model is the caller's.
                with decoding(self.mllm.trunk, self._multiply):
                    if not self._admit(queue) and not self._answers:
                        return
                    self._step()
                yield from self._updates()
        finally:
            self._cancelled = set()

    def _admit(self, queue: "_Queue") -> bool:
        """Give free slots to the next requests."""
        admitted = []
        while (request := queue.next) is not None:
            taken = sum(1 + answer.request.is_guided for answer in self._answers)
            if taken + 1 + request.is_guided > self.cache.slots:
                break
            self.check(request)
            answer = Answer(queue.take(), request, self.mllm.vocabulary, self.device)
            answer.slots.append(self._num_slots)
            self._answers.append(answer)
            admitted.append((answer.slots[0], without_last(request.prompt, 1)))
            if answer.wants_guidance:
                admitted.append(self._open_second(answer))
        if admitted:
            self._prefill(admitted)
        return bool(admitted)

    @property
    def _num_slots(self) -> int:
        return sum(len(answer.slots) for answer in self._answers)

    def _open_second(self, answer: Answer) -> tuple[int, Prompt]:
        """A slot for the sequence without condition, and what it has to see before the next pass."""
        prefix = answer.unconditional_prefix()
        answer.slots.append(self._num_slots)
        answer.lengths.append(len(prefix.ids))
        return answer.slots[1], prefix

    def _prefill(self, prefixes: Sequence[tuple[int, Prompt]]) -> None:
        """Bring the beginnings of sequences into their slots."""
        length = max(len(prefix.ids) for _, prefix in prefixes)
        if not length:
            return
        ids = torch.zeros(len(prefixes), length, dtype=torch.long)
        slot_ids, positions = torch.zeros_like(ids), torch.full_like(ids, self.cache.padding)
        semantic: list[int] = []
        pixel: list[int] = []
        images: list[Tensor] = []
        for row, (_, prefix) in enumerate(prefixes):
            count = len(prefix.ids)
            ids[row, :count] = torch.tensor(prefix.ids)
            slot_ids[row, :count] = torch.tensor(prefix.slot_ids)
            positions[row, :count] = torch.arange(count)
            semantic += [row * length + place for place in prefix.semantic_slots]
            pixel += [row * length + place for place in prefix.pixel_slots]
            images += [image.to(self.device) for image in prefix.images]
        ids, slot_ids, positions = (tensor.to(self.device) for tensor in (ids, slot_ids, positions))
        semantic_slots, pixel_slots = (
            torch.tensor(slots, dtype=torch.long, device=self.device) for slots in (semantic, pixel)
        )
        if images:
            embeds = self.mllm.embed(ids, images, semantic_slots, pixel_slots, slot_ids)
        else:  # spares the towers the blank picture that they see in training
            embeds = self.mllm.embed_tokens(ids, slot_ids)
        self.cache.begin(torch.tensor([slot for slot, _ in prefixes], device=self.device), positions)
        self.mllm.hidden(embeds, positions, cache=self.cache)

    def _step(self) -> None:
        """One pass of all sequences, and the next token of every answer."""
        last = self._forward()
        drawn = torch.zeros(len(self._answers), dtype=torch.long, device=self.device)
        for allowed, numbers in _grouped(
            range(len(self._answers)), lambda n: self._answers[n].grammar.allowed
        ):
            drawn[numbers] = self._draw(last, allowed, [self._answers[number] for number in numbers])
        words = [number for number, answer in enumerate(self._answers) if not answer.grammar.in_picture]
        read = dict(zip(words, drawn[words].tolist(), strict=True)) if words else {}
        for number, answer in enumerate(self._answers):
            answer.take(drawn[number], read.get(number), self.end_ids)
        opening = [answer for answer in self._answers if answer.wants_guidance and len(answer.slots) == 1]
        if opening:
            self._prefill([self._open_second(answer) for answer in opening])

    def _forward(self) -> Tensor:
        """Feed what every sequence has not seen; (n, D) after its last token."""
        width = max(len(answer.pending) for answer in self._answers)
        # Ids, slot ids and positions in one tensor, which goes to the device in one copy.
        fed = torch.zeros(self._num_slots, 3, width, dtype=torch.long, pin_memory=self.device.type == "cuda")
        fed[:, 2] = self.cache.padding
        drawn: list[tuple[int, Tensor]] = []
        longest = 0
        for answer in self._answers:
            count = len(answer.pending)
            known = torch.tensor([[id or 0 for id in answer.pending], answer.pending_slot_ids])
            for branch, slot in enumerate(answer.slots):
                start = answer.lengths[branch]
                fed[slot, :2, :count] = known
                fed[slot, 2, :count] = torch.arange(start, start + count)
                answer.lengths[branch] += count
                longest = max(longest, start + count)
                if answer.pending[0] is None:
                    drawn.append((slot, answer.latest))
        ids, slot_ids, positions = fed.to(self.device, non_blocking=True).unbind(1)
        if drawn:
            ids[[slot for slot, _ in drawn], 0] = torch.stack([id for _, id in drawn])
        embeds = self.mllm.embed_tokens(ids, slot_ids)
        mask = self.cache.at(positions, longest)
        hidden = self.mllm.hidden(embeds, positions, cache=self.cache, mask=mask)
        ends = (positions != self.cache.padding).sum(1) - 1
        return hidden.take_along_dim(ends[:, None, None], dim=1)[:, 0]

    def _draw(self, last: Tensor, allowed: tuple[range, ...], answers: Sequence[Answer]) -> Tensor:
        """Next ids of some answers that have the same allowed ones."""
        scores = self._scores(last, allowed, answers)
        ids = torch.empty(len(answers), dtype=torch.long, device=self.device)
        for sampling, places in _grouped(range(len(answers)), lambda place: answers[place].sampling):
            uniforms = torch.stack([answers[place].uniforms[len(answers[place].ids)] for place in places])
            ids[places] = allowed[0].start + draw(scores[places], sampling, uniforms)
        return ids

    def _scores(self, last: Tensor, allowed: tuple[range, ...], answers: Sequence[Answer]) -> Tensor:
        """Logits (n, K), with guidance, over the span of ids that some answers have in common as the allowed ones."""
        guided = [place for place, answer in enumerate(answers) if len(answer.slots) > 1]
        rows = [answer.slots[0] for answer in answers] + [answers[place].slots[1] for place in guided]
        span = range(allowed[0].start, allowed[-1].stop)
        logits = self.mllm.head.logits(last[rows], span, self._multiply).float()
        scores = logits[: len(answers)]
        if guided:
            guidance = [[answers[place].request.sampling.guidance] for place in guided]
            scales = torch.tensor(guidance, dtype=scores.dtype).to(scores.device)
            scores[guided] = guide(scores[guided], logits[len(answers) :], scales)
        return scores if len(allowed) == 1 else scores.masked_fill(self._mask(allowed), -torch.inf)

    def _make_mask(self, allowed: tuple[range, ...]) -> Tensor:
        """(K,) over the span of the allowed ids, true where an id is not allowed."""
        start = allowed[0].start
        mask = torch.ones(allowed[-1].stop - start, dtype=torch.bool)
        for ids in allowed:
            mask[ids.start - start : ids.stop - start] = False
        return mask.to(self.device)

    def _updates(self) -> Iterator[Update]:
        """News of every answer; finished ones and second sequences that are over leave their slots."""
        for answer in list(self._answers):
            answer.is_finished |= answer.number in self._cancelled
            if answer.is_finished:
                self._answers.remove(answer)
                self._vacate(answer.slots)
            elif len(answer.slots) > 1 and not answer.wants_guidance:
                self._vacate([answer.slots.pop()])
                answer.lengths.pop()
            if (update := answer.update()) is not None:
                yield update

    def _vacate(self, freed: Sequence[int]) -> None:
        """Move the last sequences into freed slots, so that those in use are the first ones."""
        holders = {
            slot: (answer, branch) for answer in self._answers for branch, slot in enumerate(answer.slots)
        }
        for slot in sorted(set(freed) - set(range(len(holders), self.cache.slots))):
            source = max(holders)
            answer, branch = holders.pop(source)
            self.cache.move(source, slot, answer.lengths[branch])
            answer.slots[branch] = slot


class _Queue:
    """Requests with their numbers, one looked at ahead."""

    def __init__(self, requests: Iterable[Request]) -> None:
        self._requests = iter(requests)
        self._number = 0
        self.next = next(self._requests, None)
        """The first one; none at the end."""

    def take(self) -> int:
        """Its number; it leaves the queue."""
        self.next = next(self._requests, None)
        self._number += 1
        return self._number - 1


def _grouped(numbers: Iterable[int], key: Callable[[int], K]) -> Iterator[tuple[K, list[int]]]:
    """Numbers with equal keys."""
    groups: defaultdict[K, list[int]] = defaultdict(list)
    for number in numbers:
        groups[key(number)].append(number)
    yield from groups.items()
