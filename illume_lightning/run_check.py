"""Whether a run's folder is in order: `illume doctor RUN`."""

import shutil
from pathlib import Path

import yaml

from illume_lightning import durable_file
from illume_lightning.folder_lock import holder
from illume_lightning.nn.sharded_checkpoint import read_rest
from illume_lightning.nn.whole_checkpoint import choose, damage, newest_first

FIT_LOCK = "fit.lock"
"""Locked in a run's folder while it trains."""

_GIB = 2**30


def check_run(folder: str | Path) -> tuple[str, bool]:
    """Read all of a run's checkpoints, and what else it needs to go on. Nothing is changed.

    Args:
        folder: of a run of `illume fit`.

    Returns:
        A line for each thing that was looked at, with the way out where something is wrong; and whether all is well.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: give that of a run, as default_root_dir names it")
    checkpoints = folder / "checkpoints"
    found = [_config(folder), _lock(folder), *_files(checkpoints), *_goes_on(checkpoints)]
    found += [*_leftovers(folder, checkpoints), *_disk(checkpoints)]
    lines = [f"  {'ok   ' if not wrong else 'WRONG'} {text}" for text, wrong in found]
    return "\n".join([f"Run {folder}", *lines]) + "\n", not any(wrong for _, wrong in found)


def _config(folder: Path) -> tuple[str, bool]:
    try:
        content = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "config.yaml is missing: `illume fit` with the run's YAML writes it", True
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        return f"config.yaml can't be read ({reason}): `illume fit` with the run's YAML writes it anew", True
    if not isinstance(content, dict):
        return "config.yaml is no configuration: `illume fit` with the run's YAML writes it anew", True
    return "config.yaml", False


def _lock(folder: Path) -> tuple[str, bool]:
    process = holder(folder, FIT_LOCK)
    return ("nobody trains it" if process is None else f"process {process} trains it"), False


def _files(checkpoints: Path) -> list[tuple[str, bool]]:
    """Every checkpoint, newest first, and what was moved aside."""
    lines = []
    for path in newest_first(checkpoints):
        if reason := damage(path):
            way_out = "`illume fit` moves it aside; or put a copy in its place, with its sum"
            lines.append((f"checkpoints/{path.name}: {reason}: {way_out}", True))
            continue
        try:
            step = read_rest(path)["global_step"]
        except (ValueError, KeyError, TypeError) as error:
            lines.append((f"checkpoints/{path.name}: {error}: move it away", True))
            continue
        how = "its sha256 is right"
        if path.is_dir():
            how = "all its parts are there"
        elif durable_file.read_sum(path) is None:
            how = f"there is no {durable_file.sum_of(path).name}: not verified but by its own checksums"
        lines.append((f"checkpoints/{path.name}: step {step}, {how}", False))
    aside = sorted(checkpoints.glob(f"*{durable_file.DAMAGED}*"))
    kept = [path.name for path in aside if path.suffix != durable_file.SUM]
    return lines + [
        (f"checkpoints/{name} was moved aside: remove it if nobody needs it", False) for name in kept
    ]


def _goes_on(checkpoints: Path) -> list[tuple[str, bool]]:
    try:
        choice = choose(checkpoints)
    except ValueError as error:
        return [(str(error), True)]
    if choice.checkpoint is None:
        return [("no checkpoint yet: `illume fit` begins at step 0", False)]
    return [(f"`illume fit` goes on from checkpoints/{choice.checkpoint.name}", False)]


def _leftovers(folder: Path, checkpoints: Path) -> list[tuple[str, bool]]:
    names = ", ".join(path.name for path in durable_file.leftovers(checkpoints))
    if not names:
        return []
    if holder(folder, FIT_LOCK) is not None:
        return [(f"{names} is being written", False)]
    return [(f"{names} was never finished: the next `illume fit` removes it", False)]


def _disk(checkpoints: Path) -> list[tuple[str, bool]]:
    """Whether the next checkpoint fits, if it is as large as the newest."""
    newest = next(iter(newest_first(checkpoints)), None)
    if newest is None:
        return []
    parts = newest.rglob("*") if newest.is_dir() else [newest]
    needed, free = sum(part.stat().st_size for part in parts), shutil.disk_usage(checkpoints).free
    text = f"the next checkpoint takes {needed / _GIB:.2f} GiB, {free / _GIB:.2f} GiB are free"
    return [(text + (": make room" if needed > free else ""), needed > free)]
