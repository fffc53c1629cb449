"""Where in memory the numbers of a convolution lie; what they are does not depend on it."""

from typing import Any

import torch
from torch import Tensor, nn


def use_channels_last(network: nn.Module) -> None:
    """Put the weights of convolutions into channels-last order, and so what they compute.

    Names, shapes and values stay: a checkpoint is read with and without this option.

    Args:
        network: whose weights have up to four dimensions.
    """
    network.to(memory_format=torch.channels_last)


def follow_weights(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Let moments that are read from a checkpoint lie in memory as their weights do now.

    Fused updates go through both in the order of memory: in different orders they would mix weights up.

    Returns:
        The same optimizer.
    """
    optimizer.register_load_state_dict_post_hook(_follow)
    return optimizer


def _follow(optimizer: torch.optim.Optimizer) -> None:
    for weight, state in optimizer.state.items():
        for name, value in state.items():
            if _lies_otherwise(value, weight):
                state[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


def _lies_otherwise(value: Any, weight: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == weight.shape and value.stride() != weight.stride()
