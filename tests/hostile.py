"""Files that do something when they are read carelessly."""

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Evil:
    """Unpickling this calls a function with arguments."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call, self.arguments


def payloads(mark: Path) -> dict[str, Any]:
    """Objects that leave a file behind when they are unpickled."""
    line = f"open({str(mark)!r}, 'w').close()"
    return {
        "exec": Evil(exec, line),
        "eval": Evil(eval, line),
        "open": Evil(open, str(mark), "w"),
        "system": Evil(os.system, f"touch {mark}"),
        "mkdir": Evil(os.mkdir, str(mark)),
        "import": Evil(__import__, "antigravity"),
        "getattr": Evil(getattr, "", "format_map"),
    }


def hostile_files(mark: Path) -> dict[str, bytes]:
    """Contents of files named as checkpoints: what is harmful stands beside weights, inside of them or alone."""
    files = {}
    for name, evil in payloads(mark).items():
        weights = {"a.weight": torch.ones(2)}
        shapes = {
            "alone": evil,
            "beside": {"state_dict": weights, "evil": evil},
            "inside": {"a.weight": [evil]},
        }
        for place, content in shapes.items():
            for is_zip in (True, False):
                buffer = io.BytesIO()
                torch.save(content, buffer, _use_new_zipfile_serialization=is_zip)
                files[f"{name} {place} {'zip' if is_zip else 'old'}"] = buffer.getvalue()
        for protocol in range(6):
            files[f"{name} pickle {protocol}"] = pickle.dumps(evil, protocol)
    return files
