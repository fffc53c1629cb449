"""Where a device's memory goes in a training step."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from illume_lightning.budget.dry_step import Precision, StepCost, blocks, tensor_bytes
from illume_lightning.lit.training import TrainingModule

Strategy = Literal["ddp", "fsdp2"]

ALLOWANCE = 2 * 2**30
"""Bytes for what is not planned: the driver's context, NCCL's or HCCL's buffers, workspaces of libraries, and gaps
between tensors. A guess that is on the safe side where memory is not cut into very small pieces."""


@dataclass(frozen=True)
class Memory:
    """Bytes on every device."""

    weights: int
    """Parameters and buffers; its share of them where they are sharded."""

    gathered: int
    """Sharded weights that are whole while they are used: all outside of blocks, and two blocks."""

    fixed: int
    """Networks that are used and never trained: LPIPS, the frozen tokenizer."""

    average: int
    """The averaged copy of the weights (EMA)."""

    gradients: int
    """Of all trained parameters."""

    buckets: int
    """DDP's copies of the gradients, on their way to the other devices."""

    optimizer: int
    """The optimizers' moments."""

    activations: int
    """What the forward pass leaves for the backward pass."""

    peak: int
    """Most at any time. Gradients come while activations go, so it is not the sum of all."""

    @property
    def needed(self) -> int:
        """The peak and the allowance for what is not planned."""
        return self.peak + ALLOWANCE


def plan_memory(
    module: TrainingModule,
    step: StepCost,
    devices: int,
    strategy: Strategy,
    precision: Precision,
    *,
    averages: bool,
    accumulates: bool,
    is_accelerator: bool = True,
) -> Memory:
    """Sum a step's memory up.

    Args:
        module: of the run.
        step: its dry step, with the same accumulation and sharding.
        devices: that share the work.
        strategy: ``ddp`` keeps everything on each device; ``fsdp2`` shards weights, gradients and moments.
        precision: of the run.
        averages: whether there is an averaged copy of the weights.
        accumulates: whether a training step has several micro-batches.
        is_accelerator: optimizers then update all parameters at once.
    """
    is_sharded = strategy == "fsdp2"
    shards = devices if is_sharded else 1
    weights, gradients = tensor_bytes(module), trained_bytes(module)
    moments, scratch = _optimizers(module, is_accelerator)
    memory = {
        "weights": weights // shards,
        "gathered": _gathered(module, precision) if is_sharded and devices > 1 else 0,
        "fixed": sum(tensor_bytes(network) for network in module.fixed.values()),
        "average": weights if averages else 0,
        "gradients": gradients // shards,
        "buckets": gradients if devices > 1 and not is_sharded else 0,
        "optimizer": moments // shards,
    }
    there = sum(memory.values())
    during = there + step.peak - (0 if accumulates or is_sharded else memory["gradients"])
    update = there - memory["gathered"] + scratch // shards
    return Memory(**memory, activations=step.kept, peak=max(during, update))


def trained_bytes(module: nn.Module) -> int:
    """Of parameters that train, and so of their gradients."""
    return sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)


def _optimizers(module: TrainingModule, is_accelerator: bool) -> tuple[int, int]:
    """Bytes of all moments, and of the largest update's temporary tensors."""
    configured: Any = module.configure_optimizers()
    moments, scratch = 0, [0]
    for optimizer in configured[0]:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        trained = sum(parameter.nbytes for parameter in parameters)
        group = optimizer.param_groups[0]
        moments += int(trained * _moments_per_weight(optimizer, parameters[0].dtype))
        if is_accelerator and "foreach" in group and group["foreach"] is not False and not group.get("fused"):
            scratch.append(trained)  # torch's updates of all parameters at once take about a copy of them
    return moments, max(scratch)


def _moments_per_weight(optimizer: torch.optim.Optimizer, dtype: torch.dtype) -> float:
    """Bytes of an optimizer's state for each byte of a parameter, found by letting it step on a small matrix."""
    matrix = nn.Parameter(torch.zeros(8, 8, dtype=dtype))
    matrix.grad = torch.zeros_like(matrix)
    group = {**optimizer.param_groups[0], "params": [matrix]}
    optimizer.param_groups = [group]
    optimizer.step()
    states = [
        value for value in optimizer.state[matrix].values() if isinstance(value, torch.Tensor) and value.ndim
    ]
    return sum(state.nbytes for state in states) / matrix.nbytes


def _gathered(module: nn.Module, precision: Precision) -> int:
    """All outside of blocks from the beginning to the end; of blocks the one that runs, and the next one.

    Blocks are gathered in autocast's type (``lit.sharding``).
    """
    sizes = sorted((tensor_bytes(block) for block in blocks(module)), reverse=True)
    width = (precision.autocast or precision.weights).itemsize
    return tensor_bytes(module) - sum(sizes) + sum(sizes[:2]) * width // precision.weights.itemsize
