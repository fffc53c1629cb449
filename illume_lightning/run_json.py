"""The record of a run, ``run.json``: reading it, and what stands for the run; docs/reproducibility.md has its keys."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from illume_lightning.json_record import read_versioned

RUN_JSON = "run.json"
VERSION = 1
MADE_BY = "`illume fit`"

RUNNING, INTERRUPTED, FINISHED = "running", "interrupted", "finished"

KEYS = (
    *("identity", "status", "config", "code", "seeds", "python", "packages", "hardware", "stores", "inputs"),
    *("steps", "max_steps", "series", "weights", "starts", "peak_memory"),
)
"""What every record has."""

_DIGITS = 16


def read_run_json(folder: Path) -> dict[str, Any]:
    """The record in a run's folder.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not readable, of another version, or lacks something.
    """
    record = read_versioned(folder / RUN_JSON, VERSION, MADE_BY)
    missing = [key for key in KEYS if key not in record]
    if missing:
        raise ValueError(f"{folder / RUN_JSON} lacks {', '.join(missing)}; {MADE_BY} writes it anew")
    return record


def find_run_json(checkpoint: Path) -> dict[str, Any] | None:
    """The record of the run that a checkpoint, or a folder, belongs to; none where there is none that can be read."""
    for folder in (checkpoint, checkpoint.parent, checkpoint.parent.parent):
        if (folder / RUN_JSON).is_file():
            try:
                return read_run_json(folder)
            except ValueError:
                return None
    return None


def moved(value: Any, root: str, to: str) -> Any:
    """A configuration with another folder for the run's own.

    Args:
        value: the configuration, or a part of it.
        root: the run's folder.
        to: what stands for it, and before everything below it.
    """
    if isinstance(value, dict):
        return {key: moved(child, root, to) for key, child in value.items()}
    if isinstance(value, list):
        return [moved(child, root, to) for child in value]
    if isinstance(value, str) and (value == root or value.startswith(root.rstrip("/") + "/")):
        return to + value[len(root) :]
    return value


def root_of(config: Mapping[str, Any]) -> str:
    """The folder of a run's configuration.

    Raises:
        ValueError: if it names none.
    """
    root = (config.get("trainer") or {}).get("default_root_dir")
    if not root:
        raise ValueError("the configuration has no trainer.default_root_dir: set it to the run's folder")
    return str(root)


def identity(config: Mapping[str, Any], source: str, stores: list[str], inputs: list[str]) -> str:
    """What stands for a run: equal for runs that are to end equal on equal machines (16 hexadecimal digits).

    Args:
        config: resolved; the run's own folder does not count.
        source: hash of the code.
        stores: hashes of the manifests, in their order.
        inputs: hashes of what it starts from, in their order.
    """
    trainer = config.get("trainer") or {}
    root = trainer.get("default_root_dir")
    placeless = moved(dict(config), str(root), "RUN") if root else dict(config)
    text = json.dumps([placeless, source, stores, inputs], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]
