"""What a run was made by: the code and the machine."""

import hashlib
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).parent
_CALLBACKS, _COMMAND = _PACKAGE.parent / "callbacks", _PACKAGE.parent / "cli.py"
_CPU_INFO = Path("/proc/cpuinfo")
_GIT_SECONDS = 60


def code() -> dict[str, Any]:
    """The code that runs.

    Returns:
        ``source_sha256`` of all Python files of this package, its callbacks and its command, wherever they are
        installed; ``commit`` of the git repository that tracks them and ``diff_sha256`` of what differs from it; both
        none, and ``why``, where there is no such repository. A clean tree has no ``diff_sha256`` and no ``why``.
    """
    found: dict[str, Any] = {"source_sha256": _source(), "commit": None, "diff_sha256": None, "why": None}
    try:
        # Fails in a virtual environment that lies in another project's repository.
        _git("ls-files", "--error-unmatch", "__init__.py")
        commit = _git("rev-parse", "HEAD").decode().strip()
        diff = _git("diff", "HEAD", "--binary", "--no-ext-diff", "--no-color")
    except (OSError, subprocess.SubprocessError) as error:
        what = "no git" if isinstance(error, FileNotFoundError) else "not in a git repository"
        return found | {"why": f"{what}: {_PACKAGE.name} is known by source_sha256 alone"}
    return found | {"commit": commit, "diff_sha256": hashlib.sha256(diff).hexdigest() if diff else None}


def commit_name(made_by: dict[str, Any]) -> str | None:
    """The commit of `code` in short, with ``-dirty`` behind it where the tree was not clean; none without git."""
    if not made_by.get("commit"):
        return None
    return str(made_by["commit"])[:12] + ("-dirty" if made_by.get("diff_sha256") else "")


def machine() -> dict[str, Any]:
    """The host: ``cpu`` model, ``cores`` as the system counts them, and ``memory_bytes``."""
    memory = None
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": _cpu(), "cores": os.cpu_count(), "memory_bytes": memory}


def _source() -> str:
    """Names and contents of all Python files."""
    digest = hashlib.sha256()
    for file in _files():
        name = file.relative_to(_PACKAGE.parent).as_posix()
        digest.update(f"{name}\n{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _files() -> Iterator[Path]:
    for folder in (_CALLBACKS, _PACKAGE):
        yield from sorted(folder.rglob("*.py"))
    if _COMMAND.is_file():
        yield _COMMAND


def _git(*words: str) -> bytes:
    command = ("git", "-C", str(_PACKAGE), *words)
    return subprocess.run(command, capture_output=True, check=True, timeout=_GIT_SECONDS).stdout


def _cpu() -> str:
    if _CPU_INFO.is_file():
        for line in _CPU_INFO.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Hardware", "cpu model"):
                return value.strip()
    return platform.processor() or platform.machine()
