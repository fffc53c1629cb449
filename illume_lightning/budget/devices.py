"""Accelerators that a run can be planned for, from their makers' data sheets."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """An accelerator."""

    name: str
    """As sold."""

    memory_gib: float
    """The sheets' GB: these makers count 2^30 bytes, of which a driver keeps about 1 %."""

    tflops: float
    """Dense bf16 products with fp32 sums, in 10^12 operations a second; fp16 has the same."""


DEVICES = {
    # NVIDIA H100 Tensor Core GPU data sheet: 1,979 TFLOPS with sparsity, half of it dense.
    "h100": Device("NVIDIA H100 SXM 80 GB", 80, 989),
    # NVIDIA H200 Tensor Core GPU data sheet: the same chip, 141 GB.
    "h200": Device("NVIDIA H200 SXM 141 GB", 141, 989),
    # NVIDIA A100 Tensor Core GPU data sheet: 312 TFLOPS dense.
    "a100": Device("NVIDIA A100 80 GB", 80, 312),
    # NVIDIA L40S data sheet: 362.05 | 733 with sparsity.
    "l40s": Device("NVIDIA L40S 48 GB", 48, 362),
    # NVIDIA Ada GPU architecture, appendix A: 165.2 dense with fp32 accumulate.
    "rtx4090": Device("NVIDIA GeForce RTX 4090 24 GB", 24, 165),
    # Huawei has no public sheet of the chip alone. 376 is said of the 910B2, and less of others sold under this name:
    # 313 of the 910B3, 280 of the 910B4, which has 32 GB.
    "910b": Device("Huawei Ascend 910B2 64 GB", 64, 376),
}


def find_device(name: str) -> Device:
    """A device by its short name.

    Raises:
        ValueError: if it is unknown; lists those that are known.
    """
    if name not in DEVICES:
        raise ValueError(f"device {name!r} is unknown: choose one of {', '.join(DEVICES)}")
    return DEVICES[name]
