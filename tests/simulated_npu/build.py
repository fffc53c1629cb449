"""Compile the simulated device, once for each version of its source and of torch."""

import fcntl
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import torch
from torch.utils import cpp_extension

SOURCE = Path(__file__).with_name("npu.cpp")
CACHE = Path(__file__).parents[2] / ".cache" / "simulated_npu"


def build() -> Path:
    """The library's path; compiling takes half a minute.

    Raises:
        FileNotFoundError: there is no C++ compiler.
        RuntimeError: it doesn't compile.
    """
    version = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = CACHE / f"npu-{version}.so"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:  # of tests side by side one compiles
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.is_file():
            _compile(library)
    return library


def _compile(library: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        raise FileNotFoundError("there is no C++ compiler c++; CXX can name another")
    partial = library.with_suffix(".partial")
    command = [
        *(compiler, "-std=c++20", "-O0", "-w", "-shared", "-fPIC", str(SOURCE), "-o", str(partial)),
        *(f"-I{folder}" for folder in cpp_extension.include_paths()),
        *(f"-L{folder}" for folder in cpp_extension.library_paths()),
        *("-lc10", "-ltorch_cpu", "-ltorch"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-6000:]}")
    partial.replace(library)


if __name__ == "__main__":
    build()
