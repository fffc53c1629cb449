"""Turning target images of conversations into records of codes."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from illume_lightning.data.conversation_store import ConversationStore
from illume_lightning.data.packing import image_size
from illume_lightning.data.part import Lost, Sample
from illume_lightning.data.schedule import Phase
from illume_lightning.data.token_cache import pack_codes
from illume_lightning.data.transform import decode_at
from illume_lightning.lit.device import choose_device
from illume_lightning.lit.dualvitok import to_float
from illume_lightning.lit.tokenizer import fingerprint, load_tokenizer
from illume_lightning.nn.dualvitok import DualViTok
from illume_lightning.resolution import Size


@dataclass(frozen=True)
class TokenEncoder:
    """A tokenizer on a device; every process loads its own."""

    tokenizer: str
    device: str

    @property
    def fingerprint(self) -> str:
        """Of the tokenizer."""
        return fingerprint(_load(self.tokenizer, self.device))

    @property
    def codebooks(self) -> dict[str, int]:
        """Codes of each branch."""
        quantizers = _load(self.tokenizer, self.device).quantizers
        return {name: quantizer.codebook_size for name, quantizer in quantizers.items()}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[bytes]:
        """Records of uint8 pictures (B, 3, H, W)."""
        codes = _load(self.tokenizer, self.device).encode(to_float(images.to(self.device))).codes
        semantic, pixel = (grid.cpu().numpy() for grid in (codes.semantic, codes.pixel))
        return [pack_codes(*pair) for pair in zip(semantic, pixel, strict=True)]


@lru_cache(maxsize=1)
def _load(tokenizer: str, device: str) -> DualViTok:
    network = load_tokenizer(tokenizer).to(choose_device(device))
    missing = {"semantic", "pixel"} - set(network.quantizers)
    if missing:
        raise ValueError(
            f"the tokenizer {tokenizer} has no {missing.pop()} codes; the MLLM generates both kinds"
        )
    return network


class _Target(NamedTuple):
    record: int
    image: int
    size: Size


@dataclass
class TokenPart:
    """A range of conversations, whose target images are encoded in batches of one size."""

    store: ConversationStore
    records: range
    phase: Phase
    encoder: TokenEncoder
    batch_size: int

    @property
    def num_items(self) -> int:
        """Number of target images."""
        first, last = self.store.first_image[[self.records.start, self.records.stop]]
        return int(self.store.images[first:last, 0].sum())

    def read(self) -> Iterator[Sample | Lost]:
        """In the order of the conversations, one record for each target image.

        An image that would lose more than 20 % to a crop gets an empty record, so that the others keep their
        numbers; the plan leaves its conversation out.
        """
        of_size: defaultdict[Size, list[_Target]] = defaultdict(list)
        order: list[tuple[int, int]] = []
        for record in self.records:
            for image, (is_target, height, width, _) in enumerate(self.store.images_of(record).tolist()):
                if is_target:
                    order.append((record, image))
                    sized = image_size(self.phase, True, height, width)
                    if sized is not None:
                        of_size[sized.size].append(_Target(record, image, sized.size))
        found: dict[tuple[int, int], tuple[bytes, Size]] = {}
        for size, targets in sorted(of_size.items()):
            for start in range(0, len(targets), self.batch_size):
                batch = targets[start : start + self.batch_size]
                for target, packed in zip(batch, self._encode(batch), strict=True):
                    found[target.record, target.image] = packed, size
        for record, image in order:
            packed, size = found.get((record, image), (b"", (0, 0)))
            yield Sample(f"{record}:{image}", packed, "", "", *size)

    def _encode(self, targets: list[_Target]) -> list[bytes]:
        pictures = [
            decode_at(self.store.read(target.record).images[target.image], target.size) for target in targets
        ]
        return self.encoder(torch.from_numpy(np.stack(pictures)))
