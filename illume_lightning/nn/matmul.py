"""Matrix products where the library's own choice of kernel is not the fastest."""

import torch
import torch.nn.functional as F
from torch import Tensor


def product(a: Tensor, b: Tensor) -> Tensor:
    """A @ b.T of (p, q) and (r, q), both of one dtype; without gradients."""
    if a.device.type == "cpu" and a.dtype == torch.float32 and _has_onednn():
        # torch.mm takes MKL for fp32, which runs at half of oneDNN's speed on AMD.
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], None)
    return a @ b.t()


class PackedProducts:
    """Products of a few rows with the same weights again and again, on a CPU at the speed at which memory is read.

    In their usual order weights of two rows are read twice (fp32, MKL) or at under half of that speed (bf16). Here each
    is copied once, when it is first used, into the order of oneDNN's kernels, and again when it has changed: memory of
    the weights used for about 3 times the speed. Elsewhere than on a CPU, under autocast, and where ``is_on`` is false,
    these are torch's own products.
    """

    def __init__(self, is_on: bool = True) -> None:
        self.is_on = is_on and _has_onednn()
        self._packed: dict[tuple[int, torch.Size], tuple[int, Tensor, Tensor]] = {}

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """As ``F.linear``, without gradients: (..., q) and (r, q) -> (..., r)."""
        if not self.is_on or weight.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return F.linear(x, weight, bias)
        flat = x.reshape(-1, x.shape[-1])
        result = torch.ops.mkldnn._linear_pointwise(flat, self._pack(weight), bias, "none", [], None)
        return result.view(*x.shape[:-1], -1)

    def _pack(self, weight: Tensor) -> Tensor:
        # Slices of a table are new tensors every time; their place in memory and the table's version are not. The
        # weight is kept, so that nothing else can come to stand in its place.
        key = weight.data_ptr(), weight.shape
        version, packed, _ = self._packed.get(key, (None, weight, weight))
        if version != weight._version:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
            self._packed[key] = weight._version, packed, weight
        return packed


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
