"""How much of a codebook is in use, over all ranks."""

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric


class CodebookHealth(NamedTuple):
    """What ``CodebookUsage`` computes.

    Attributes:
        usage: share of codes seen at least once, in [0, 1], fp32.
        perplexity: exponential of the entropy of the code histogram; the codebook size at most. fp32.
        dead: number of codes never seen, int64.
    """

    usage: Tensor
    perplexity: Tensor
    dead: Tensor


class CodebookUsage(Metric):
    """Counts code ids since the last reset; the counts are summed over ranks.

    Args:
        num_codes: size of the codebook.
    """

    full_state_update = False

    def __init__(self, num_codes: int) -> None:
        super().__init__()
        self.num_codes = num_codes
        self.counts: Tensor
        self.add_state("counts", torch.zeros(num_codes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, indices: Tensor) -> None:
        """Count code ids of any shape, int64."""
        self.counts += torch.bincount(indices.flatten(), minlength=self.num_codes)

    def go_on(self, counts: Tensor) -> None:
        """Add (num_codes,) counts of all ranks, from a checkpoint; one rank has to."""
        self.update(counts.new_empty(0))
        self.counts += counts

    def compute(self) -> CodebookHealth:
        """Usage, perplexity and number of dead codes."""
        return health_of(self.counts)


def health_of(counts: Tensor) -> CodebookHealth:
    """Usage, perplexity and number of dead codes of counts (K,), integers."""
    share = counts.float() / counts.sum().clamp_min(1)
    seen = counts > 0
    entropy = -(share[seen] * share[seen].log()).sum()
    return CodebookHealth(seen.float().mean(), entropy.exp(), (~seen).sum())
