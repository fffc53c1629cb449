"""A micro-batch of a phase as the plan would give it, of its largest pictures, without data."""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from illume_lightning.data.packed_batch import PADDING_DOCUMENT, PackedBatch
from illume_lightning.data.packing import NUM_SIZE_TOKENS, pack
from illume_lightning.data.schedule import Phase
from illume_lightning.image_layout import image_layout
from illume_lightning.lit.datamodule import ImageBatch
from illume_lightning.lit.mllm import MLLMStage
from illume_lightning.lit.training import TrainingModule
from illume_lightning.resolution import Size

TEXT_TOKENS = 128
"""Of a conversation's texts, half of them the answer's."""


def sample_batch(
    module: TrainingModule, phase: Phase, data: dict[str, Any], fake: FakeTensorMode | None
) -> ImageBatch | PackedBatch:
    """What one device reads for one forward pass.

    Args:
        module: that is to train on it.
        phase: of the curriculum.
        data: ``init_args`` of the run's datamodule.
        fake: makes the pictures without values; none gives them some.

    Raises:
        ValueError: if a picture is too long for a row.
    """
    if isinstance(module, MLLMStage):
        return _Conversations(module, phase, data, fake).batch()
    count = phase.micro_batch_size
    numbers = torch.tensor([*range(count)])
    captions = [f"a picture with the number {number}" for number in range(count)]
    pictures = _pictures(count, phase.largest_size, fake)
    return ImageBatch(pictures, captions, [""] * count, numbers, numbers, numbers)


def _pictures(count: int, size: Size, fake: FakeTensorMode | None) -> Tensor:
    if fake is None:
        return torch.zeros(count, 3, *size, dtype=torch.uint8)
    with fake:
        return torch.zeros(count, 3, *size, dtype=torch.uint8)


class _Conversations:
    """Conversations that all edit a picture: one to look at, some words, and one to generate.

    These are the longest that there are. Without room for both pictures the first is left out.
    """

    def __init__(
        self, module: MLLMStage, phase: Phase, data: dict[str, Any], fake: FakeTensorMode | None
    ) -> None:
        vocabulary = module.model.vocabulary
        self._phase, self._fake = phase, fake
        self._row_tokens = data["row_tokens"]
        self._sizes = phase.largest_size, phase.generating.largest_size
        self._layouts = [image_layout(size, vocabulary) for size in self._sizes]
        self._seen = self._layouts[0].length
        self._made = NUM_SIZE_TOKENS + self._layouts[1].length + TEXT_TOKENS
        if self._seen + self._made > self._row_tokens:
            self._seen = 0
        self.length = self._seen + self._made
        """Tokens of a conversation."""
        if self.length > self._row_tokens:
            raise ValueError(
                f"row_tokens {self._row_tokens} is too short for a picture of {self._sizes[1][0]} x "
                f"{self._sizes[1][1]} pixels to generate, which takes {self._made} tokens with {TEXT_TOKENS} of text: "
                "raise it"
            )
        is_cached = any(task["tokens"] for task in (data["train"] or {}).values())
        self._is_encoded = module.tokenizer_path is not None and not is_cached
        self._is_discrete = module.model.discrete_input

    def batch(self) -> PackedBatch:
        """As ``PackedConversations`` reads it."""
        count = self._phase.micro_batch_size
        rows = pack([self.length] * count, self._row_tokens)
        width = max(len(row) for row in rows) * self.length
        starts = [
            number * width + place * self.length
            for number, row in enumerate(rows)
            for place in range(len(row))
        ]
        documents = torch.full((len(rows) * width,), PADDING_DOCUMENT)
        positions = torch.zeros(len(rows) * width, dtype=torch.long)
        for number, start in enumerate(starts):
            documents[start : start + self.length] = number
            positions[start : start + self.length] = torch.arange(self.length)
        seen, made = self._layouts
        words = TEXT_TOKENS // 2
        first = self._seen + words + NUM_SIZE_TOKENS
        predicted = [
            start + place - 1 for start in starts for place in range(self._seen + words, self.length)
        ]
        inputs = starts if self._seen else []
        targets = [start + first for start in starts] if self._is_encoded else []
        shape, tokens = (len(rows), width), torch.tensor([*range(count)])
        return PackedBatch(
            ids=torch.zeros(shape, dtype=torch.long),
            position_ids=positions.view(shape),
            document_ids=documents.view(shape),
            slot_ids=torch.zeros(shape, dtype=torch.long),
            images=[_pictures(count, self._sizes[0], self._fake)] if inputs else [],
            semantic_slots=_places(inputs, seen.semantic_slots),
            pixel_slots=_places(inputs, seen.pixel_slots),
            target_images=[_pictures(count, self._sizes[1], self._fake)] if targets else [],
            target_semantic_slots=_places(targets, made.semantic_slots),
            target_pixel_slots=_places(targets, made.pixel_slots),
            target_positions=torch.tensor(predicted),
            segments=torch.zeros(len(predicted), dtype=torch.long),
            tasks=torch.zeros(len(predicted), dtype=torch.long),
            answers=torch.zeros(len(predicted), dtype=torch.long),
            num_supervised=len(predicted),
            dataset=tokens,
            index=tokens,
            sample_number=tokens,
        )


def _places(starts: list[int], slots: tuple[int, ...]) -> Tensor:
    return torch.tensor([start + slot for start in starts for slot in slots], dtype=torch.long)
