"""Stands in for torch_npu in tests: `npu` devices that compute on the CPU, and an `hccl` that sends by gloo.

On the path of a test's child process it is what the package imports as torch_npu. Environment: SIMULATED_NPU is the
compiled library of npu.cpp, SIMULATED_NPU_COUNT the number of devices (2).
"""

import os
import sys

import torch

torch.ops.load_library(os.environ["SIMULATED_NPU"])
torch.utils.rename_privateuse1_backend("npu")

from torch_npu import hccl, npu  # noqa: E402  # they need the library

npu.set_device_count(int(os.environ.get("SIMULATED_NPU_COUNT", "2")))
torch._register_device_module("npu", npu)
sys.modules["torch.npu"] = npu
torch.utils.generate_methods_for_privateuse1_backend()
hccl.register()


def npu_fusion_attention(*_: object, **__: object) -> None:
    """Transformers imports it; attention here is torch's own."""
    raise NotImplementedError
