"""What a run left behind: its configuration and its last checkpoint, built into a model again."""

import math
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser
from torch import nn

from illume_lightning.lit.class_paths import restrict
from illume_lightning.nn.checkpoints import check_state_dict, read_state_dict
from illume_lightning.nn.sharded_checkpoint import is_sharded

M = TypeVar("M", bound=nn.Module)

LAST = Path("checkpoints") / "last.ckpt"
CONFIG = "config.yaml"

_MOST_VALUES = 1_000_000


class SavedRun:
    """A run's folder, one of its checkpoints, sharded or not, or weights beside a configuration.

    Args:
        path: the folder, a file in its folder ``checkpoints``, or a file with ``config.yaml`` beside it.

    Raises:
        FileNotFoundError: if there is no checkpoint, or no configuration beside it.
        ValueError: if the configuration can't be read.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        beside = path.parent if (path.parent / CONFIG).is_file() else path.parent.parent
        is_run = path.is_dir() and not is_sharded(path)
        self.folder, self.checkpoint = (path, path / LAST) if is_run else (beside, path)
        config = self.folder / CONFIG
        for file in (self.checkpoint, config):
            if not (file.is_file() or is_sharded(file)):
                raise FileNotFoundError(
                    f"{path} is no run: {file} is missing; give the folder of a run of `illume fit`, or one of its "
                    "checkpoints"
                )
        self.config = _read(config)

    @staticmethod
    def has_config(file: Path) -> bool:
        """Whether it is known what model a file of weights belongs to."""
        return any((folder / CONFIG).is_file() for folder in (file.parent, file.parent.parent))

    def section(self, *keys: str) -> Any:
        """A part of the configuration; none where there is none."""
        found: Any = self.config
        for key in keys:
            found = (found or {}).get(key)
        return found

    def build(self, kind: type[M], *keys: str) -> M:
        """Make what a part of the configuration describes, with untrained weights.

        Args:
            kind: class, or base class, of it.
            keys: where it stands.

        Raises:
            ArgumentError: if it names classes that are not allowed (``class_paths``), or an argument is wrong.
            ValueError: if the run has no such part.
        """
        section = self.section(*keys)
        if section is None:
            raise ValueError(
                f"{self.folder} has no {'.'.join(keys)} in its configuration: it is a run of another part"
            )
        restrict()
        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(kind, "part")
        return parser.instantiate_classes(parser.parse_object({"part": _untrained(section)})).part

    def fill(self, model: M) -> M:
        """Give a model the weights of the checkpoint, strictly.

        Raises:
            ValueError: if they don't fit; names what differs.
        """
        state = read_state_dict(self.checkpoint)
        part = (self.section("model", "class_path") or "").rpartition(".")[2]
        check_state_dict(model.state_dict(), state, f"{self.checkpoint} ({part})")
        model.load_state_dict(state)
        return model


def _read(config: Path) -> dict[str, Any]:
    """Plain values alone; YAML's tags would make objects."""
    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{config} can't be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{config} is no configuration of a run: it holds {str(content)[:80]}")
    if _num_values(content, {}) > _MOST_VALUES:
        raise ValueError(
            f"{config} is no configuration of a run: its references make endless values of few lines"
        )
    return content


def _num_values(section: Any, known: dict[int, float]) -> float:
    """Values in all, where one that is referred to counts each time; infinitely many if it holds itself."""
    if not isinstance(section, dict | list):
        return 1
    if id(section) not in known:
        known[id(section)] = math.inf
        inner = section.values() if isinstance(section, dict) else section
        known[id(section)] = 1 + sum(_num_values(value, known) for value in inner)
    return known[id(section)]


def _untrained(section: Any, in_tower: bool = False) -> Any:
    """The same without files of pretrained vision towers: the checkpoint has them."""
    if isinstance(section, list):
        return [_untrained(value, in_tower) for value in section]
    if not isinstance(section, dict):
        return section
    return {
        key: None
        if in_tower and key == "pretrained"
        else _untrained(value, in_tower or key == "semantic_encoder")
        for key, value in section.items()
    }
