"""Kept memory is not faulted in again."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, torch
from illume_lightning.host_memory import keep_freed_memory
if {keep}:
    assert keep_freed_memory()
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(2**24) for _ in range(4)]
    del blocks
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


def faults(keep: bool) -> int:
    """Page faults of the eighth round of four 64 MiB blocks."""
    command = [sys.executable, "-c", SCRIPT.format(keep=keep)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc only")
def test_freed_blocks_are_reused() -> None:
    assert faults(keep=True) < 100 < faults(keep=False)
