"""Batch norm over all devices: its statistics are those of the whole batch, however many devices share it."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` whose mean and variance in training count every device's pictures.

    On any backend of torch.distributed; with one process it is ``nn.BatchNorm2d`` itself. ``nn.SyncBatchNorm``
    does the same with kernels that only CUDA has. Statistics are in fp32; gradients reach the pictures of all
    devices, for losses that are summed, or averaged as DDP does, over devices.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape and type; every device has to call it."""
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(input)
        x = input.float()
        count = x.new_tensor(x.numel() / x.shape[1])
        sums = _SumOverDevices.apply(torch.cat([x.sum((0, 2, 3)), count[None]]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = x - mean[:, None, None]
        # A second pass: the difference of two sums would lose the digits of a small variance.
        variance = _SumOverDevices.apply(centred.square().sum((0, 2, 3))) / count
        self._track(mean.detach(), variance.detach(), count)
        output = centred * (variance + self.eps).rsqrt()[:, None, None]
        if self.affine:
            output = output * self.weight[:, None, None] + self.bias[:, None, None]
        return output.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        rate = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), rate)
        unbiased = variance * count / (count - 1)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), rate)


class _SumOverDevices(torch.autograd.Function):
    """Sum over devices; a device's summand gets the sum of all devices' gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient


def count_over_devices(module: nn.Module) -> None:
    """Turn every ``nn.BatchNorm2d`` below a module into a ``GlobalBatchNorm2d`` with the same tensors, in place."""
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            setattr(module, name, _converted(child))
        else:
            count_over_devices(child)


def _converted(norm: nn.BatchNorm2d) -> GlobalBatchNorm2d:
    options = {"affine": norm.affine, "track_running_stats": norm.track_running_stats}
    new = GlobalBatchNorm2d(norm.num_features, norm.eps, norm.momentum, **options, device="meta")
    # The very tensors, as optimizers and DDP hold them.
    new._parameters, new._buffers = norm._parameters, norm._buffers
    return new.train(norm.training)
