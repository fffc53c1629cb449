"""Host memory of a training process."""

import ctypes
import platform

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Let this process keep large freed blocks instead of handing them back to the kernel.

    By default glibc maps every block above 32 MiB anew, and the kernel clears it page by page at first touch:
    on a CPU that is up to a third of a training step with activations of that size. Kept blocks are reused, and
    the process stays as large as it once was. Accelerators have their own memory and gain nothing.

    Returns:
        Whether it took effect; ``False`` without glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_MAX, 0)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, -1))
