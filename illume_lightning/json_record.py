"""JSON files that other commands wrote, read with errors that name the file, the key and the way out."""

import json
import math
from pathlib import Path
from typing import Any

_KINDS = {str: "a text", float: "a number", int: "a whole number", bool: "true or false"}
_KINDS |= {list: "a list", dict: "an object"}


def read_versioned(path: Path, version: int, made_by: str) -> dict[str, Any]:
    """Read a JSON object with the key ``version``.

    Args:
        path: the file.
        version: the newest that is understood.
        made_by: the command that writes such files, for messages.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not JSON, not an object, or of another version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; {made_by} writes it")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON ({error}); {made_by} writes it anew") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} holds {type(record).__name__}, not an object; {made_by} writes it anew")
    found = record.get("version")
    if isinstance(found, int) and found > version:
        raise ValueError(
            f"{path} is of version {found} and this installation reads up to {version}: "
            "update illume-lightning"
        )
    if found != version:
        raise ValueError(f"{path} says version {found!r}, not {version}; {made_by} writes it anew")
    return record


def field(record: dict[str, Any], key: str, kind: type, optional: bool = False) -> Any:
    """A value of the expected kind, or None where it is optional and absent or null.

    Raises:
        ValueError: if it is missing or of another kind.
    """
    value = record.get(key)
    if value is None and optional:
        return None
    accepted = (int, float) if kind is float else (kind,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{key!r} is {str(value)[:80]!r}, not {_KINDS[kind]}")
    return value


def objects(record: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """A list of objects.

    Raises:
        ValueError: if it is something else.
    """
    values = field(record, key, list)
    for number, value in enumerate(values):
        if not isinstance(value, dict):
            raise ValueError(f"{key}[{number}] is {str(value)[:80]!r}, not an object")
    return values


def texts(record: dict[str, Any], key: str) -> tuple[str, ...]:
    """A list of texts; none where it is absent or null.

    Raises:
        ValueError: if it is something else.
    """
    values = field(record, key, list, optional=True) or []
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"{key!r} is {str(values)[:80]!r}, not a list of texts")
    return tuple(values)


def finite(record: dict[str, Any], key: str) -> float | None:
    """A number; None where it is absent, null, infinite or not a number.

    Raises:
        ValueError: if it is something else.
    """
    value = field(record, key, float, optional=True)
    return float(value) if value is not None and math.isfinite(value) else None
