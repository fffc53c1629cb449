"""How lmms-eval finds our model: the entry point group ``lmms_eval.models`` of pyproject.toml."""

from typing import Any


def manifest() -> Any:
    """Name and class of the model; the class is imported only when it is asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        "illume_lightning", "illume_lightning.eval.lmms_eval.IllumeLmms", aliases=("illume",)
    )
