"""Which classes a configuration may name: a YAML that someone sent must not run what it likes.

A name is checked before anything is imported, and once more where the object that it leads to is defined, so that
`torch.nn.modules.module.os.system` is no way around. What remains must be of the type that is expected there.
"""

import os
import re
import sys

from jsonargparse import set_parsing_settings

from illume_lightning.interpolation import forbid_environment

ALLOWED = (
    *(
        "illume_lightning.budget.published",
        "illume_lightning.data",
        "illume_lightning.lit",
        "illume_lightning.nn",
    ),
    *("illume_lightning.grammar", "illume_lightning.resolution", "illume_lightning.vocabulary", "callbacks"),
    *("lightning.pytorch.accelerators", "lightning.pytorch.callbacks", "lightning.pytorch.core"),
    *("lightning.pytorch.loggers", "lightning.pytorch.plugins", "lightning.pytorch.profilers"),
    *("lightning.pytorch.strategies", "lightning.fabric.loggers", "lightning.fabric.plugins"),
    *("torch.nn", "torch.optim", "torch.distributed.fsdp", "torch.distributed.device_mesh"),
    *("diffusers.DDPMScheduler", "diffusers.schedulers"),
)
"""Packages and objects whose classes may be named; all else is refused."""

VARIABLE = "ILLUME_ALLOW"
"""Environment variable with more packages, commas between them: those of a user's own classes."""

_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
_NEVER = sys.stdlib_module_names | {"jsonargparse"}
_DENIED = re.compile(
    r"Importing '([\w.]+)' is not allowed, denied by the '[\w.*]+' entry of the import path denylist\.\s+Add the "
    r"import path to import_path_allowlist in set_parsing_settings to allow it\."
)


def restrict() -> None:
    """From now on refuse the names of all classes but the allowed ones, and values out of the environment.

    Raises:
        ValueError: if the environment variable is no list of packages.
    """
    more = [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    for name in more:
        if not _NAME.fullmatch(name) or name.split(".")[0] in _NEVER:
            raise ValueError(
                f"{VARIABLE} holds {name!r}: give packages of your own, such as {VARIABLE}=mypackage,other.module; "
                "the standard library can't be allowed"
            )
    # A value that may be anything is never made into an object.
    set_parsing_settings(
        import_path_denylist=["*"],
        import_path_allowlist=[*ALLOWED, *more],
        instantiate_subclass_spec_in_any=False,
    )
    forbid_environment()


def explained(message: str) -> str:
    """A parser's message with the way out in it, where a name was refused."""
    return _DENIED.sub(_way_out, message)


def _way_out(found: re.Match[str]) -> str:
    package = found[1].split(".")[0]
    way_out = f"if you trust it, allow its package by the environment, {VARIABLE}={package}"
    return (
        "a configuration may only name classes of illume_lightning, callbacks, lightning, torch.nn, torch.optim and "
        f"diffusers' schedulers, so {found[1]} is not imported: "
        + ("remove it" if package in _NEVER else way_out)
    )
