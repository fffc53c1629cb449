"""What runs say of themselves in ``run.json``, in a line each."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from illume_lightning.json_record import field, finite, objects
from illume_lightning.provenance import commit_name
from illume_lightning.report import words
from illume_lightning.run_json import read_run_json

_SHOWN_PACKAGES = ("torch", "lightning")


@dataclass(frozen=True)
class RunRow:
    """A run's record, as it is written."""

    status: str
    commit: str
    """In short, with ``-dirty`` behind it where the tree was not clean; "no git" without."""

    identity: str
    versions: str
    hardware: str
    seed: str
    steps: str
    samples: str
    duration: str
    restarts: int
    memory: str
    """The most that was taken: of the host, and of a device where there is one."""


def read_run_row(folder: Path) -> RunRow:
    """Read the record of a run.

    Raises:
        FileNotFoundError: if it has none, as runs of earlier versions.
        ValueError: if it can't be read, or lacks something.
    """
    record = read_run_json(folder)
    code, hardware = field(record, "code", dict), field(record, "hardware", dict)
    samples, seconds = field(record, "samples", int, optional=True), finite(record, "seconds")
    return RunRow(
        status=field(record, "status", str),
        commit=commit_name(code) or "no git",
        identity=field(record, "identity", str),
        versions=_versions(record),
        hardware=_hardware(hardware),
        seed=str(field(record, "seeds", dict).get("seed_everything")),
        steps=f"{field(record, 'steps', int):,}",
        samples=words.NOTHING if samples is None else f"{samples:,}",
        duration=words.duration(seconds or 0.0),
        restarts=len(objects(record, "starts")) - 1,
        memory=_memory(field(record, "peak_memory", dict)),
    )


def _versions(record: dict[str, Any]) -> str:
    packages = field(record, "packages", dict)
    known = [f"{name} {packages[name]}" for name in _SHOWN_PACKAGES if packages.get(name)]
    return ", ".join([f"Python {field(record, 'python', str)}", *known])


def _hardware(hardware: dict[str, Any]) -> str:
    devices = [str(device) for device in field(hardware, "devices", list)]
    names = [f"{devices.count(name)} x {name}" for name in dict.fromkeys(devices) if name != "cpu"]
    threads = field(hardware, "threads", int)
    host = [f"{field(hardware, 'cpu', str)}, {threads} thread{'s' if threads > 1 else ''}"]
    size = field(hardware, "world_size", int)
    return ", ".join(
        [*(names or host), *([f"{size} processes"] if size > 1 else []), str(hardware.get("precision"))]
    )


def _memory(peak: dict[str, Any]) -> str:
    shown = [(finite(peak, "host_bytes"), "host"), (finite(peak, "device_bytes"), "device")]
    parts = [f"{value / 2**30:.1f}{words.SPACE}GiB {name}" for value, name in shown if value is not None]
    return ", ".join(parts) or words.NOTHING
