"""Writes a benchmark's figures with what they were measured on."""

import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def hardware() -> dict[str, Any]:
    """CPU model and cores, load of the last minute, memory in GiB, accelerator where there is one."""
    fields = {}
    for file in ("/proc/cpuinfo", "/proc/meminfo"):
        if Path(file).is_file():
            for line in Path(file).read_text().splitlines():
                key, _, value = line.partition(":")
                fields.setdefault(key.strip(), value.strip())
    return {
        "cpu": fields.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "load_1min": round(os.getloadavg()[0], 2),
        "memory_gib": round(int(fields.get("MemTotal", "0 kB").split()[0]) / 2**20, 1),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def commit() -> str | None:
    """The checked-out commit, with ``+`` where tracked files differ from it."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return described.stdout.strip() or None


def write(name: str, results: dict[str, Any], started_on: dict[str, Any]) -> Path:
    """Write ``results/<name>.json``: command, date, versions, hardware and the results.

    Args:
        name: of the benchmark.
        results: its figures.
        started_on: ``hardware()`` before the run, since the run itself raises the load.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    record = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hardware": started_on,
        **results,
    }
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path


def table(rows: list[list[str]]) -> str:
    """Rows of cells, the first one a heading, as aligned text."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
