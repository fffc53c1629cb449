"""Releases of other packages that must not run. The standard library only."""

import importlib.metadata

COMPROMISED = {"lightning": ("2.6.2", "2.6.3")}
"""Versions that somebody else put malicious code into, by package."""


def is_compromised(package: str, version: str) -> bool:
    """Whether a release is one of those."""
    return version in COMPROMISED.get(package, ())


def refuse_compromised() -> None:
    """Called before any of these packages is imported.

    Raises:
        ImportError: If such a release is installed.
    """
    for package in COMPROMISED:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if is_compromised(package, version):
            raise ImportError(
                f"{package} {version} is a compromised release, and illume ran nothing of it: "
                f"pip install -U {package}; if it was ever imported here, take this machine's keys for stolen"
            )
