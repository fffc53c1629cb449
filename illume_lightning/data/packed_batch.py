"""Batches of packed conversations: ids, places of images, and what is to be predicted."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from illume_lightning.data.chat import render, unconditional
from illume_lightning.data.conversation import Conversation
from illume_lightning.data.conversation_store import ConversationStore
from illume_lightning.data.loader import decode_stored
from illume_lightning.data.packing import MicroBatchItems, PackItem, SizedImage, image_size
from illume_lightning.data.schedule import Phase
from illume_lightning.data.spare import Spares, batch_fields
from illume_lightning.data.store import Store
from illume_lightning.data.text_tokenizer import TextTokenizer
from illume_lightning.data.token_cache import TokenCache
from illume_lightning.data.token_sequence import Cells, TokenSequence, token_sequence
from illume_lightning.vocabulary import Vocabulary

PADDING_DOCUMENT = -1


class PackedBatch(NamedTuple):
    """R rows of T places, B conversations in all; flat places count through the rows.

    Args:
        ids: int64 (R, T); images to tokenise have code 0 in their cells.
        position_ids: int64 (R, T), from 0 in every conversation.
        document_ids: int64 (R, T), number of the conversation in the batch, -1 is padding.
        slot_ids: int64 (R, T), as `ImageLayout.slot_ids`, 0 outside of images.
        images: uint8 (n, 3, H, W) each: input images by size.
        semantic_slots: int64 (S,), flat places of these images' semantic features.
        pixel_slots: int64 (P,), flat places of their pixel features.
        target_images: uint8 (n, 3, H, W) each: images to tokenise by size; none where a cache has the codes.
        target_semantic_slots: int64, flat places of their semantic codes.
        target_pixel_slots: int64, flat places of their pixel codes.
        target_positions: int64 (M,), flat places from which the next one's id is predicted.
        segments: int64 (M,), number in `SEGMENTS` of what is predicted.
        tasks: int64 (M,), dataset that it comes from.
        answers: int64 (M,), number of the assistant's turn in the batch that it belongs to.
        num_supervised: tokens to predict in the whole training step, over all devices and micro-batches.
        dataset: int64 (B,), number of the source.
        index: int64 (B,), record in the source's store.
        sample_number: int64 (B,), running number in the run, or in the evaluation.
        damages: what was found damaged, a line each; `index` names what was read instead.
    """

    ids: Tensor
    position_ids: Tensor
    document_ids: Tensor
    slot_ids: Tensor
    images: list[Tensor]
    semantic_slots: Tensor
    pixel_slots: Tensor
    target_images: list[Tensor]
    target_semantic_slots: Tensor
    target_pixel_slots: Tensor
    target_positions: Tensor
    segments: Tensor
    tasks: Tensor
    answers: Tensor
    num_supervised: int
    dataset: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    sample_number: Tensor
    damages: tuple[str, ...] = ()


class ConversationData(NamedTuple):
    """A dataset as it is read.

    Args:
        store: the conversations.
        caches: codes of its target images; one is used in the phases that it was made for.
    """

    store: ConversationStore
    caches: Sequence[TokenCache] = ()

    def cache(self, phase: Phase) -> TokenCache | None:
        """The one for a phase; none if there is none."""
        return next((cache for cache in self.caches if cache.fits(phase)), None)


class PackedConversations:
    """Reads the rows that a plan names.

    Args:
        data: the datasets, in the plan's order.
        phases: of the run.
        vocabulary: of the model.
        tokenizer: of text.
        seed: of the condition's dropout.
        condition_dropout: probability that a conversation with a target image loses its users' texts, for
            guidance.
        release_prompts: it gets the official release's unconditional prompts instead.
        is_tolerant: another conversation may be read in place of a damaged one, see `Spares`.
    """

    writes_images = False

    def __init__(
        self,
        data: Sequence[ConversationData],
        phases: Sequence[Phase],
        vocabulary: Vocabulary,
        tokenizer: TextTokenizer,
        seed: int = 0,
        condition_dropout: float = 0.0,
        release_prompts: bool = False,
        is_tolerant: bool = False,
    ) -> None:
        self.data, self.phases = list(data), list(phases)
        self.vocabulary, self.tokenizer = vocabulary, tokenizer
        self.seed = seed
        self.condition_dropout, self.release_prompts = condition_dropout, release_prompts
        self.spares = Spares(seed, is_tolerant)

    @property
    def stores(self) -> list[Store]:
        """All that it reads from."""
        return [store for data in self.data for store in (data.store, *data.caches)]

    def records(self, items: MicroBatchItems) -> Iterator[tuple[Store, int]]:
        """Store and number of every record of a batch."""
        for item in (item for row in items.rows for item in row):
            data = self.data[item.dataset]
            yield data.store, item.index
            cache = data.cache(self.phases[item.phase])
            if cache is not None:
                yield from ((cache, number) for number in cache.numbers(item.index))

    def read(self, items: MicroBatchItems, images: Tensor | None = None) -> PackedBatch:
        """Read a micro-batch; ``images`` is not used.

        Raises:
            DamagedRecord: if a record is damaged, and none may be read in its place.
        """
        flat = [item for row in items.rows for item in row]
        taken = [
            self.spares.read(
                item.sample_number, item.index, partial(self._sample, item), partial(self._alike, item)
            )
            for item in flat
        ]
        samples = iter(taken)
        packer = _Packer([[next(samples).content for _ in row] for row in items.rows])
        return PackedBatch(
            **packer.tokens(),
            **packer.places("inputs", "images", "semantic_slots", "pixel_slots"),
            **packer.places("targets", "target_images", "target_semantic_slots", "target_pixel_slots"),
            num_supervised=items.num_supervised,
            **batch_fields(flat, taken),
        )

    def _sample(self, item: PackItem, index: int) -> "_Sample":
        """Read a conversation for a sample's place."""
        data, phase = self.data[item.dataset], self.phases[item.phase]
        record = data.store.read(index)
        cache = data.cache(phase)
        conversation, shown = record.conversation, tuple(range(len(record.images)))
        if self._is_unconditional(item, conversation):
            conversation, shown = unconditional(conversation, self.release_prompts)
        tokens = token_sequence(
            render(conversation, self.tokenizer),
            self._sizes(item, index),
            self.vocabulary,
            lambda image: None if cache is None else cache.codes(index, image),
            shown,
        )
        pictures = {
            cells.image: decode_stored(
                record.images[cells.image],
                cells.size.size,
                data.store,
                index,
                stretch=cells.size.stretch,
            )
            for cells in (*tokens.inputs, *tokens.targets)
        }
        return _Sample(tokens, pictures, item.dataset)

    def _sizes(self, item: PackItem, index: int) -> list[SizedImage]:
        rows = self.data[item.dataset].store.images_of(index)
        is_generation = bool(rows[:, 0].any())
        sizes = [
            image_size(self.phases[item.phase], is_generation, height, width)
            for height, width in rows[:, 1:3].tolist()
        ]
        return [size for size in sizes if size is not None]

    def _alike(self, item: PackItem, random: np.random.Generator) -> Iterator[int]:
        """Conversations with the same images but for what they show, and no more text: they fit the row."""
        store = self.data[item.dataset].store
        rows, sizes = store.images_of(item.index), self._sizes(item, item.index)
        counts = np.diff(store.first_image)
        few = np.flatnonzero((counts == len(rows)) & (store.num_text <= store.num_text[item.index]))
        few = random.permutation(few)
        gaps = store.num_text[item.index] - store.num_text[few]
        learned = np.abs(store.num_supervised[item.index] - store.num_supervised[few])
        for other in few[np.lexsort((learned, gaps))].tolist():
            has_same = (store.images_of(other)[:, [0, 3]] == rows[:, [0, 3]]).all()
            if other != item.index and has_same and self._sizes(item, other) == sizes:
                yield other

    def _is_unconditional(self, item: PackItem, conversation: Conversation) -> bool:
        if not self.condition_dropout or not any(conversation.is_target):
            return False
        bits = np.random.Philox(key=[self.seed, item.sample_number])
        return bool(np.random.Generator(bits).random() < self.condition_dropout)


class _Sample(NamedTuple):
    tokens: TokenSequence
    pictures: dict[int, np.ndarray]
    dataset: int


class _Packer:
    """Lays samples side by side in rows."""

    def __init__(self, rows: Sequence[Sequence[_Sample]]) -> None:
        self.shape = len(rows), max(sum(len(sample.tokens.ids) for sample in row) for row in rows)
        self.samples: list[tuple[int, _Sample]] = []
        """Samples with the flat places at which they begin."""
        for number, row in enumerate(rows):
            start = number * self.shape[1]
            for sample in row:
                self.samples.append((start, sample))
                start += len(sample.tokens.ids)

    def tokens(self) -> dict[str, Any]:
        """What every place holds, and what is predicted."""
        ids, positions, slots = (np.zeros(self.shape, dtype=np.int64) for _ in range(3))
        documents = np.full(self.shape, PADDING_DOCUMENT, dtype=np.int64)
        predicted, segments, tasks, answers = [], [], [], []
        num_answers = 0
        for number, (start, sample) in enumerate(self.samples):
            tokens = sample.tokens
            here = slice(start, start + len(tokens.ids))
            ids.flat[here], slots.flat[here] = tokens.ids, tokens.slots
            positions.flat[here], documents.flat[here] = np.arange(len(tokens.ids)), number
            supervised = np.flatnonzero(tokens.is_supervised)
            predicted.append(start + supervised - 1)
            segments.append(tokens.segments[supervised])
            tasks.append(np.full(len(supervised), sample.dataset))
            # Something that is not predicted stands between any two answers.
            begins = np.diff(supervised, prepend=-1) > 1
            answers.append(num_answers + np.cumsum(begins) - 1)
            num_answers += int(begins.sum())
        return {
            "ids": torch.from_numpy(ids),
            "position_ids": torch.from_numpy(positions),
            "document_ids": torch.from_numpy(documents),
            "slot_ids": torch.from_numpy(slots),
            "target_positions": _joined(predicted),
            "segments": _joined(segments),
            "tasks": _joined(tasks),
            "answers": _joined(answers),
        }

    def places(self, kind: str, images: str, semantic: str, pixel: str) -> dict[str, Any]:
        """Pictures by size, and the flat places of their cells in the same order, under the names given."""
        of_size: defaultdict[tuple[int, int], list[tuple[int, _Sample, Cells]]] = defaultdict(list)
        for start, sample in self.samples:
            for cells in getattr(sample.tokens, kind):
                of_size[cells.size.size].append((start, sample, cells))
        groups = [of_size[size] for size in sorted(of_size)]
        in_order = [place for group in groups for place in group]
        return {
            images: [
                torch.from_numpy(np.stack([sample.pictures[cells.image] for _, sample, cells in group]))
                for group in groups
            ],
            semantic: _joined([start + cells.semantic for start, _, cells in in_order]),
            pixel: _joined([start + cells.pixel for start, _, cells in in_order]),
        }


def _joined(arrays: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *arrays]))
