"""Codes and latents made before training: what a store of them holds, and batches of it."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from safetensors.torch import load, save
from torch import Tensor

from illume_lightning.data.plan import PlanItem
from illume_lightning.data.store import ImageStore, Manifest

KIND = "latents"
"""The manifest's ``kind`` of such a store; of pictures it is anything else."""


class LatentBatch(NamedTuple):
    """B samples of one size.

    Args:
        latents: float (B, C, h, w) of the pictures.
        semantic: int64 (B, h1, w1) codes, or ``None`` where the tokenizer has no such branch.
        pixel: int64 (B, h2, w2) codes, or ``None``.
        captions: B texts.
        metas: B texts, JSON.
        dataset: int64 (B,), number of the source.
        index: int64 (B,), record in the source's store.
        sample_number: int64 (B,), running number in the run.
    """

    latents: Tensor
    semantic: Tensor | None
    pixel: Tensor | None
    captions: list[str]
    metas: list[str]
    dataset: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    sample_number: Tensor


def pack(latents: Tensor, codes: dict[str, Tensor]) -> bytes:
    """One sample's record: latents (C, h, w) in fp16, code ids by branch (h, w) in int32."""
    tensors = {"latents": latents.half(), **{name: ids.int() for name, ids in codes.items()}}
    return save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})


class PlannedLatents:
    """Reads the samples that a plan names; a whole batch at a time.

    Args:
        stores: of latents, in the plan's order.
    """

    writes_images = False

    def __init__(self, stores: Sequence[ImageStore]) -> None:
        self.stores = list(stores)

    def records(self, items: Sequence[PlanItem]) -> Iterator[tuple[ImageStore, int]]:
        """Store and number of every record of a batch."""
        return ((self.stores[item.dataset], item.index) for item in items)

    def read(self, items: Sequence[PlanItem], images: Tensor | None = None) -> LatentBatch:
        """Read a batch of items that have one size; ``images`` is not used.

        Raises:
            ValueError: if the phases ask for another size than the latents were made at.
        """
        records = []
        for item in items:
            store = self.stores[item.dataset]
            size = tuple(store.sizes[item.index].tolist())
            if size != item.size:
                raise ValueError(
                    f"{store.location} holds latents of {size[0]} x {size[1]} where the phase asks for "
                    f"{item.size[0]} x {item.size[1]} (height x width); prepare latents with the phase's mode and side"
                )
            records.append(store.read(item.index))
        samples = [load(record.image) for record in records]

        def stacked(name: str) -> Any:
            return torch.stack([s[name] for s in samples]) if name in samples[0] else None

        semantic, pixel = stacked("semantic"), stacked("pixel")
        numbers = torch.tensor([[item.dataset, item.index, item.sample_number] for item in items])
        return LatentBatch(
            stacked("latents"),
            None if semantic is None else semantic.long(),
            None if pixel is None else pixel.long(),
            [record.caption for record in records],
            [record.meta for record in records],
            *numbers.unbind(dim=1),
        )


def tokenizer_of(manifests: Sequence[Manifest]) -> str | None:
    """Fingerprint of the tokenizer that made stores of latents; ``None`` for stores of pictures, or no store.

    Raises:
        ValueError: if pictures and latents, or latents of several tokenizers, are mixed.
    """
    found = {
        manifest.identity["tokenizer"] if manifest.identity["kind"] == KIND else None
        for manifest in manifests
    }
    if len(found) > 1:
        kinds = ", ".join(sorted("pictures" if name is None else f"latents by {name[:12]}" for name in found))
        raise ValueError(f"the training stores mix {kinds}; give stores of one kind, by one tokenizer")
    return found.pop() if found else None
