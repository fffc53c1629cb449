"""An MLLM small enough to train in a test, and batches for it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from illume_lightning.image_layout import image_layout
from illume_lightning.nn.mllm import MLLM, build_trunk
from illume_lightning.nn.pixel import PixelEncoder
from illume_lightning.nn.semantic import QwenVisionTower
from illume_lightning.resolution import Size
from illume_lightning.vocabulary import Vocabulary

VOCABULARY = Vocabulary(50, semantic_codes=64, pixel_codes=96, size_step=16, num_sizes=8, num_unused=5)


def build_mllm(
    tied: bool = False,
    slot_grid: int = 0,
    width: int = 32,
    vocabulary: Vocabulary = VOCABULARY,
    discrete_input: bool = False,
    adapter_rms: float = 0.0,
    **trunk: Any,
) -> MLLM:
    """Two blocks and towers that train; ``trunk``: other sizes of the trunk."""
    sizes = {"width": width, "depth": 2, "num_heads": 4, "num_kv_heads": 2, "mlp_width": 64, "init_std": 0.2}
    tower = QwenVisionTower(1, 32, 2, 48)
    encoder = PixelEncoder(8, num_res_blocks=1, latent_channels=8, norm_groups=4)
    options = {"tied": tied, "slot_grid": slot_grid, "discrete_input": discrete_input}
    options["adapter_rms"] = adapter_rms
    return MLLM(build_trunk(**(sizes | trunk)), vocabulary, tower, encoder, **options, init_std=0.5)


class Document(NamedTuple):
    """Text, an input picture where there is a size, and an answer of codes and text; all drawn from the seed."""

    seed: int
    size: Size | None = None
    length: int = 8


def pack(rows: Sequence[Sequence[Document]], length: int) -> dict[str, Any]:
    """Arguments of ``MLLM.forward`` for rows of documents, padded to a length."""
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    batch: dict[str, Any] = {"position_ids": ids.clone(), "document_ids": ids - 1, "images": []}
    places: dict[str, list[int]] = {"semantic_slots": [], "pixel_slots": [], "target_positions": []}
    targets: list[Tensor] = []
    for row, documents in enumerate(rows):
        place = 0
        for document in documents:
            generator = torch.Generator().manual_seed(document.seed)
            tokens = torch.randint(VOCABULARY.size, (document.length,), generator=generator)
            start = row * length + place
            if document.size is not None:
                layout = image_layout(document.size, VOCABULARY)
                batch["images"].append(torch.rand(1, 3, *document.size, generator=generator) * 2 - 1)
                places["semantic_slots"].extend(start + slot for slot in layout.semantic_slots)
                places["pixel_slots"].extend(start + slot for slot in layout.pixel_slots)
                tokens = torch.cat([torch.tensor(layout.template), tokens])
            here = slice(place, place + len(tokens))
            ids[row, here] = tokens
            batch["position_ids"][row, here] = torch.arange(len(tokens))
            batch["document_ids"][row, here] = document.seed
            last = start + len(tokens) - 1
            places["target_positions"].extend(range(last - 4, last))
            targets.append(tokens[-4:])
            place += len(tokens)
    tensors = {name: torch.tensor(values, dtype=torch.long) for name, values in places.items()}
    return {"ids": ids, **batch, **tensors, "targets": torch.cat(targets)}
