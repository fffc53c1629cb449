"""ILLUME+ as a reproducible experiment package: DualViTok, diffusion decoder and unified multimodal LLM.

Floors, from below: sizes and layouts (standard library only) -> ``nn`` (pure torch) and ``data`` (LitData)
-> ``lit`` (Lightning) -> ``evaluation``, ``app``, ``eval``, ``schedule`` and ``report`` side by side -> ``callbacks``
-> ``commands`` -> ``cli``. Imports go only downwards.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from illume_lightning.lit.illume import Event, Illume, Reply
    from illume_lightning.lit.prompts import Chat, Edit, Generate
    from illume_lightning.nn.token_sampling import SegmentSampling, TokenSampling

__version__ = "0.1.0"

__all__ = ["Chat", "Edit", "Event", "Generate", "Illume", "Reply", "SegmentSampling", "TokenSampling"]

_HOMES = {
    "illume_lightning.lit.illume": ("Event", "Illume", "Reply"),
    "illume_lightning.lit.prompts": ("Chat", "Edit", "Generate"),
    "illume_lightning.nn.token_sampling": ("SegmentSampling", "TokenSampling"),
}


def __getattr__(name: str) -> Any:
    """The public names, imported when first asked for: the libraries beneath take seconds."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
