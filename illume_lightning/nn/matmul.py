"""Matrix products where the library's own choice of kernel is not the fastest."""

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor) -> Tensor:
    """A @ b.T of (p, q) and (r, q), both of one dtype."""
    if a.device.type == "cpu" and a.dtype == torch.float32 and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        # torch.mm takes MKL for fp32, which runs at half of oneDNN's speed on AMD.
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], None)
    return a @ b.t()
