"""Activations that are computed again in the backward pass instead of being kept."""

from collections.abc import Iterable
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute(blocks: Iterable[nn.Module]) -> None:
    """Keep only the inputs of blocks in training, and compute the rest again when their gradients are due.

    Results and names of weights stay as they are.

    Args:
        blocks: none within another one; their forward passes draw no random numbers.
    """
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
