"""Turning pictures of a store into records of codes and latents."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from illume_lightning.data.bucket import target_size
from illume_lightning.data.latents import pack
from illume_lightning.data.part import Lost, Sample
from illume_lightning.data.schedule import Phase
from illume_lightning.data.store import ImageStore
from illume_lightning.data.transform import decode_at
from illume_lightning.lit.diffusion_decoder import encode_at_half_size
from illume_lightning.lit.dualvitok import to_float
from illume_lightning.nn.dualvitok import DualViTok
from illume_lightning.nn.latents import SpaceToDepth, VAELatents
from illume_lightning.resolution import Size, ratio_sizes


@dataclass
class LatentEncoder:
    """Tokenizer and latents on a device."""

    tokenizer: DualViTok
    latents: VAELatents | SpaceToDepth
    device: str

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[bytes]:
        """Records of uint8 pictures (B, 3, H, W)."""
        pictures = to_float(images.to(self.device))
        codes = encode_at_half_size(pictures, self.tokenizer)
        latents = self.latents.encode(pictures)
        ids = {name: getattr(codes, name) for name in self.tokenizer.quantizers}
        return [
            pack(latent, {name: grid[number] for name, grid in ids.items()})
            for number, latent in enumerate(latents)
        ]


@dataclass
class LatentPart:
    """A range of a store's records, encoded in batches of one size."""

    store: ImageStore
    records: range
    phase: Phase
    encoder: LatentEncoder
    batch_size: int

    @property
    def num_items(self) -> int:
        """Number of pictures."""
        return len(self.records)

    def read(self) -> Iterator[Sample | Lost]:
        """Sorted by size, so that a chunk's records have one."""
        sizes = ratio_sizes(self.phase.side, self.phase.size_step)
        of_size: defaultdict[Size, list[int]] = defaultdict(list)
        for index in self.records:
            size = target_size(self.phase, sizes, *self.store.sizes[index].tolist())
            if size is None:
                yield Lost(str(index), "cropped by more than 20 %")
            else:
                of_size[size].append(index)
        for size, indices in sorted(of_size.items()):
            for start in range(0, len(indices), self.batch_size):
                yield from self._encode(size, indices[start : start + self.batch_size])

    def _encode(self, size: Size, indices: list[int]) -> Iterator[Sample]:
        records = [self.store.read(index) for index in indices]
        images = torch.stack([torch.from_numpy(decode_at(r.image, size).copy()) for r in records])
        try:
            encoded = self.encoder(images)
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}, among records {indices} of {self.store.location}") from error
        for index, record, packed in zip(indices, records, encoded, strict=True):
            yield Sample(str(index), packed, record.caption, record.meta, *size)
