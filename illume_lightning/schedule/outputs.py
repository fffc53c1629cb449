"""What steps leave and what it was made from, as hashes."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from illume_lightning.schedule.steps import Step, read_yaml

COMMAND = "its command"
HARDWARE = (
    "--trainer.accelerator",
    "--trainer.devices",
    "--trainer.num_nodes",
    "--trainer.strategy",
    "--data.num_workers",
)
"""Options of a fit that change how its steps are shared out, not what they see: a run may move."""

_LAST = Path("checkpoints") / "last.ckpt"
_MANIFEST = "manifest.json"
_SCORES = "scores.json"
# What an interrupted preparation leaves beside the store that it makes.
_PARTIAL = ".partial"


def is_there(step: Step, partly: bool = False) -> bool:
    """Whether a step's output lies there.

    Args:
        step: A fit's is its last checkpoint.
        partly: Also count what an interrupted preparation left.
    """
    output = Path(step.output)
    if step.is_fit:
        return (output / _LAST).exists()
    return output.exists() or (partly and Path(step.output + _PARTIAL).exists())


def hash_output(step: Step) -> str:
    """The sha256 of what a step left; "" if it isn't there.

    Of a run its last checkpoint, of a store its manifest (of a folder of stores all of theirs), of an evaluation its
    scores, of anything else the names and contents of all files.

    Raises:
        ValueError: If a fit's last checkpoint is a folder of FSDP2's devices; names the command that makes it a file.
    """
    output = Path(step.output)
    if step.is_fit:
        output /= _LAST
        _require_file(output)
    elif step.command[0] == "evaluate" and (output / _SCORES).is_file():
        output /= _SCORES
    elif (output / _MANIFEST).is_file():
        output /= _MANIFEST
    if output.is_file():
        return _hash_file(output)
    if not output.is_dir():
        return ""
    stores = sorted(output.rglob(_MANIFEST))
    files = stores or sorted(path for path in output.rglob("*") if path.is_file())
    return _hash_json([[str(file.relative_to(output)), _hash_file(file)] for file in files])


def ingredients(step: Step, earlier: Sequence[tuple[Step, str]]) -> dict[str, str]:
    """Hashes of what decides a step's output, by what they are called in messages.

    Comments, blank lines and the order of keys in YAML files don't count, and neither does the hardware.

    Args:
        step: The step.
        earlier: The steps before it with the hash of what each left; those count that the step mentions. A
            report is about all of them.
    """
    found = {COMMAND: _hash_json([_without_hardware(step), step.output])}
    for file in step.configs:
        found[file] = _hash_json(OmegaConf.to_container(read_yaml(file)))
    mentioned = step.mentioned([other.output for other, _ in earlier])
    for other, digest in earlier:
        if step.command[0] == "report" or other.output in mentioned:
            found[f"what step {other.name!r} made"] = digest
    return found


def fingerprint(found: dict[str, str]) -> str:
    """One sha256 of all ingredients."""
    return _hash_json(found)


def move_aside(step: Step) -> str | None:
    """Rename a step's output, and what is left of an interrupted one, to `<output>.old-<n>`.

    Returns:
        The new name; none if there was nothing.
    """
    there = [path for path in (step.output, step.output + _PARTIAL) if Path(path).exists()]
    number = 1
    while any(Path(f"{path}.old-{number}").exists() for path in there):
        number += 1
    for path in there:
        os.rename(path, f"{path}.old-{number}")
    return f"{there[0]}.old-{number}" if there else None


def _require_file(checkpoint: Path) -> None:
    if checkpoint.is_dir():
        raise ValueError(
            f"{checkpoint} is a folder that FSDP2's devices wrote, and a schedule takes a file: make one of it with "
            f"`illume consolidate {checkpoint} {checkpoint}`, or train with strategy fsdp2"
        )


def _without_hardware(step: Step) -> list[str]:
    """The command without options of `HARDWARE` and their values."""
    words, skip = [], False
    for word in step.command:
        if skip or word.partition("=")[0] in HARDWARE:
            skip = not skip and "=" not in word
        else:
            words.append(word)
    return words


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_json(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
