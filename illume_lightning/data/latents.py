"""Codes and latents made before training: what a store of them holds, and batches of it."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from illume_lightning.data.manifest import Manifest
from illume_lightning.data.plan import PlanItem
from illume_lightning.data.spare import Spares, batch_fields, of_same_size
from illume_lightning.data.store import ImageStore, Record

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
        damages: what was found damaged, a line each; `index` names what was read instead.
    """

    latents: Tensor
    semantic: Tensor | None
    pixel: Tensor | None
    captions: list[str]
    metas: list[str]
    dataset: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    sample_number: Tensor
    damages: tuple[str, ...] = ()


def pack(latents: Tensor, codes: dict[str, Tensor]) -> bytes:
    """One sample's record: latents (C, h, w) in fp16, code ids by branch (h, w) in int32.

    Raises:
        FloatingPointError: if latents are not finite, or beyond fp16's largest number, 65,504.
    """
    tensors = {"latents": latents.half(), **{name: ids.int() for name, ids in codes.items()}}
    if not tensors["latents"].isfinite().all():
        raise FloatingPointError("latents are not finite in fp16")
    return save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})


class PlannedLatents:
    """Reads the samples that a plan names; a whole batch at a time.

    Args:
        stores: of latents, in the plan's order.
        seed: of the choice of what is read in place of a damaged record.
        is_tolerant: another record may be read in place of a damaged one, see `Spares`.
    """

    writes_images = False

    def __init__(self, stores: Sequence[ImageStore], seed: int = 0, is_tolerant: bool = False) -> None:
        self.stores = list(stores)
        self.spares = Spares(seed, is_tolerant)

    def records(self, items: Sequence[PlanItem]) -> Iterator[tuple[ImageStore, int]]:
        """Store and number of every record of a batch."""
        return ((self.stores[item.dataset], item.index) for item in items)

    def read(self, items: Sequence[PlanItem], images: Tensor | None = None) -> LatentBatch:
        """Read a batch of items that have one size; ``images`` is not used.

        Raises:
            ValueError: if the phases ask for another size than the latents were made at.
            DamagedRecord: if a record is damaged, and none may be read in its place.
        """
        taken = []
        for item in items:
            store = self.stores[item.dataset]
            size = tuple(store.sizes[item.index].tolist())
            if size != item.size:
                raise ValueError(
                    f"{store.location} holds latents of {size[0]} x {size[1]} where the phase asks for "
                    f"{item.size[0]} x {item.size[1]} (height x width); prepare latents with the phase's mode and side"
                )
            taken.append(
                self.spares.read(
                    item.sample_number,
                    item.index,
                    partial(_read_one, store),
                    partial(of_same_size, store.sizes, item.index),
                )
            )
        records = [one.content[0] for one in taken]
        samples = [one.content[1] for one in taken]

        def stacked(name: str) -> Any:
            return torch.stack([s[name] for s in samples]) if name in samples[0] else None

        semantic, pixel = stacked("semantic"), stacked("pixel")
        return LatentBatch(
            stacked("latents"),
            None if semantic is None else semantic.long(),
            None if pixel is None else pixel.long(),
            [record.caption for record in records],
            [record.meta for record in records],
            **batch_fields(items, taken),
        )


def _read_one(store: ImageStore, index: int) -> tuple[Record, dict[str, Tensor]]:
    """A record and its tensors; DamagedRecord if they cannot be what was written."""
    record = store.read(index)
    try:
        tensors = load(record.image)
    except (SafetensorError, ValueError, KeyError) as error:
        raise store.damaged(index, f"no latents: {error}") from error
    if "latents" not in tensors or not tensors["latents"].isfinite().all():
        raise store.damaged(index, "its latents are not finite")
    return record, tensors


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
