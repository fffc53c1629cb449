"""What a run is made from: its stores, and the weights and files that its configuration names."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from illume_lightning.data.store import MANIFEST, Store, sha256
from illume_lightning.lit.saved_run import LAST
from illume_lightning.nn.sharded_checkpoint import read_rest
from illume_lightning.provenance import commit_name
from illume_lightning.run_json import find_run_json

PATHS = ("checkpoint", "ckpt_path", "folder", "tokenizer", "pretrained", "backbone_weights", "text_tokenizer")
"""Arguments, wherever they stand in a configuration, that name files which a run starts from."""

_NOT_SHOWN = ("class_path", "init_args")


def store_record(store: Store) -> dict[str, Any]:
    """What a run's record says of a store."""
    identity = store.manifest.identity
    return {
        "path": store.location,
        "manifest_sha256": sha256(store.path / MANIFEST),
        "content_sha256": store.manifest.fingerprint,
        "records": len(store),
        "kind": identity.get("kind"),
        "tokenizer": identity.get("tokenizer"),
    }


def input_records(config: dict[str, Any], known: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """What a run's record says of the files that it starts from, in the order of the configuration.

    Args:
        config: resolved.
        known: records of an earlier start; files that have not changed since then are not read again.
    """
    return [_input_record(key, path, known) for key, path in _named_paths(config)]


def hash_input(path: str | Path) -> str:
    """The sha256 of a file, of a run's last checkpoint, or of names and contents of all files of a folder.

    Raises:
        FileNotFoundError: if there is nothing.
    """
    files = _files(_checkpoint(Path(path)))
    if not files:
        raise FileNotFoundError(f"there is nothing at {path}")
    if len(files) == 1 and files[0][0] == "":
        return sha256(files[0][1])
    return hashlib.sha256("".join(f"{name}\n{sha256(file)}\n" for name, file in files).encode()).hexdigest()


def _input_record(key: str, path: str, known: Sequence[dict[str, Any]]) -> dict[str, Any]:
    record: dict[str, Any] = {"key": key, "path": path, "sha256": None, "bytes": None, "modified": None}
    record |= {"global_step": None, "run": None}
    checkpoint = _checkpoint(Path(path))
    stats = [file.stat() for _, file in _files(checkpoint)]
    if not stats:  # the name of a model that a library fetches
        return record
    record["bytes"] = sum(stat.st_size for stat in stats)
    record["modified"] = max(stat.st_mtime_ns for stat in stats)
    same = ("key", "path", "bytes", "modified")
    earlier = next((other for other in known if all(other[name] == record[name] for name in same)), None)
    record["sha256"] = earlier["sha256"] if earlier else hash_input(path)
    if checkpoint.suffix == ".ckpt":
        record["global_step"] = read_rest(checkpoint).get("global_step")
    record["run"] = _short(find_run_json(checkpoint))
    return record


def _short(record: dict[str, Any] | None) -> dict[str, Any] | None:
    """Of another run's record what tells where its weights come from."""
    if record is None:
        return None
    return {
        "identity": record["identity"],
        "status": record["status"],
        "steps": record["steps"],
        "commit": commit_name(record["code"]),
        "fingerprint": (record["weights"] or {}).get("fingerprint"),
        "stores": [
            {key: store[key] for key in ("path", "content_sha256", "tokenizer")} for store in record["stores"]
        ],
        "inputs": [
            {key: made_from[key] for key in ("key", "path", "sha256", "run")}
            for made_from in record["inputs"]
        ],
    }


def _named_paths(section: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Every path in a configuration under the name of its argument, such as "trainer.WarmStart.checkpoint"."""
    if isinstance(section, list):
        for number, value in enumerate(section):
            path = value.get("class_path") if isinstance(value, dict) else None
            name = str(path).rpartition(".")[2] if path else str(number)
            yield from _named_paths(value, place.removesuffix("callbacks.") + name + ".")
    elif isinstance(section, dict):
        for key, value in section.items():
            if key in PATHS and isinstance(value, str):
                yield place + key, value
            else:
                yield from _named_paths(value, place if key in _NOT_SHOWN else f"{place}{key}.")


def _checkpoint(path: Path) -> Path:
    """The file or folder of weights that a path stands for: of a run its last checkpoint."""
    return path / LAST if (path / LAST).exists() else path


def _files(path: Path) -> list[tuple[str, Path]]:
    """The file under the name "", or all files of a folder by name; nothing where there is nothing."""
    if path.is_file():
        return [("", path)]
    found = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else []
    return [(file.relative_to(path).as_posix(), file) for file in found]
