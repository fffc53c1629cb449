"""Matrix products where the library's own choice of kernel is not the fastest."""

import torch
import torch.nn.functional as F
from torch import Tensor


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """A @ b.T, plus a bias (r,), of (p, q) and (r, q), all of one dtype; without gradients."""
    if a.device.type == "cpu" and a.dtype == torch.float32 and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        # torch takes MKL for fp32: half of oneDNN's speed on AMD, and with two or three rows of a it reads b as often.
        return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], None)
    return F.linear(a, b, bias)
