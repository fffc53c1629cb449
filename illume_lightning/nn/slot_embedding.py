"""A learned vector for every place in a picture; neither the paper nor the official release has it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from illume_lightning.image_layout import NUM_SLOTS, SLOT_STEPS


class SlotEmbedding(nn.Module):
    """Vectors at the nodes of a grid laid over the picture, interpolated in between (bilinear).

    A place is a share of the picture's height and width, so what is learned at one size holds at another.
    Semantic and pixel cells have a grid each, in the parameter ``weight`` (2 * side^2, width).

    Args:
        side: nodes along the height and along the width, at least 2.
        width: of the language model.
        std: standard deviation of the initial vectors; by default they start at zero.

    Raises:
        ValueError: if ``side`` is less than 2.
    """

    nodes: Tensor
    shares: Tensor

    def __init__(self, side: int, width: int, std: float = 0.0) -> None:
        super().__init__()
        if side < 2:
            raise ValueError(
                f"slot_grid is {side}: choose at least 2 nodes a side, or 0 for no slot embedding"
            )
        self.weight = nn.Parameter(torch.zeros(2 * side**2, width))
        if std:  # else no random number is drawn
            nn.init.normal_(self.weight, std=std)
        nodes, shares = _corners(side)
        self.register_buffer("nodes", nodes, persistent=False)
        self.register_buffer("shares", shares, persistent=False)

    def forward(self, slot_ids: Tensor) -> Tensor:
        """Slot ids (R, T), as in ``ImageLayout.slot_ids`` -> (R, T, width); zero at slot 0, outside of pictures."""
        flat = slot_ids.flatten()
        vectors = F.embedding_bag(
            self.nodes[flat],
            self.weight,
            per_sample_weights=self.shares[flat].to(self.weight.dtype),
            mode="sum",
        )
        return vectors.view(*slot_ids.shape, -1)


def _corners(side: int) -> tuple[Tensor, Tensor]:
    """The four nodes around every slot, and their shares: (1 + NUM_SLOTS, 4) each."""
    place = ((torch.arange(SLOT_STEPS) + 0.5) / SLOT_STEPS * side - 0.5).clamp(0, side - 1)
    low = place.long().clamp(max=side - 2)
    ends = torch.stack([low, low + 1], dim=1)
    weights = torch.stack([low + 1 - place, place - low], dim=1)
    nodes = ends[:, None, :, None] * side + ends[None, :, None, :]
    shares = weights[:, None, :, None] * weights[None, :, None, :]
    nodes, shares = nodes.reshape(-1, 4), shares.reshape(-1, 4)
    nodes, shares = torch.cat([nodes, nodes + side**2]), shares.repeat(2, 1)
    assert len(nodes) == NUM_SLOTS
    return F.pad(nodes, (0, 0, 1, 0)), F.pad(shares, (0, 0, 1, 0))
