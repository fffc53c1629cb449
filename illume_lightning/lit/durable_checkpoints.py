"""Checkpoint files that a kill, a full disk or a flipped bit can't take from a run."""

import logging
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import Strategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from illume_lightning import durable_file
from illume_lightning.nn.whole_checkpoint import choose

log = logging.getLogger(__name__)


class DurableCheckpointIO(TorchCheckpointIO):
    """Lightning's TorchCheckpointIO, writing files that are whole at every instant, with a sha256 beside each.

    Sharded folders and addresses of object stores are written as Lightning does.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint.

        Raises:
            OSError: If it can't be written; names the file, the bytes that it takes and those that are free.
        """
        if storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with durable_file.replacing(target) as file:
                torch.save(checkpoint, file)  # type: ignore[arg-type]  # it only writes
        except (OSError, RuntimeError) as error:
            if (cause := _system_error(error)) is None:
                raise
            free = shutil.disk_usage(target.parent).free
            raise OSError(
                cause.errno,
                f"{target} can't be written ({cause.strerror}): it takes {num_bytes(checkpoint):,} bytes, {free:,} are "
                "free; the checkpoints before it are whole: make room and start the run again",
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, never unpickling more than plain values, whatever ``weights_only`` says."""
        return super().load_checkpoint(path, map_location, weights_only=True)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint, and its sum."""
        super().remove_checkpoint(path)
        if _is_local_file_protocol(path):
            durable_file.remove(Path(path))

    def link_checkpoint(self, source: str | Path, path: str | Path) -> None:
        """Let a checkpoint be found under a second name.

        Raises:
            OSError: If it can't be made.
        """
        durable_file.link(Path(source), Path(path))


class BackgroundCheckpointIO(AsyncCheckpointIO):
    """Writes checkpoints in a thread while training goes on: one of ``trainer.plugins``.

    Training waits for a copy of all tensors in the host's memory, and for the checkpoint before if that is still being
    written. What is linked or removed comes after what was to be written before it, and not at all if that failed.

    Args:
        checkpoint_io: what writes.
    """

    def __init__(self, checkpoint_io: DurableCheckpointIO | None = None) -> None:
        super().__init__(checkpoint_io or DurableCheckpointIO())
        self._latest: Future[None] | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Copy a checkpoint and begin to write it.

        Raises:
            OSError: If the checkpoint before could not be written.
        """
        self.finish()
        copy = apply_to_collection(checkpoint, Tensor, _on_host)
        self._later(self._io.save_checkpoint, copy, path, storage_options)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint, after what is being written."""
        self._later(self._io.remove_checkpoint, path)

    def link_checkpoint(self, source: str | Path, path: str | Path) -> None:
        """Let a checkpoint be found under a second name, after it is written."""
        self._later(self._io.link_checkpoint, source, path)

    def finish(self) -> None:
        """Wait until everything is written.

        Raises:
            OSError: If something could not be.
        """
        latest, self._latest = self._latest, None
        if latest is not None:
            latest.result()

    def teardown(self) -> None:
        """Finish, and end the thread."""
        super().teardown()
        self.finish()

    @property
    def _io(self) -> DurableCheckpointIO:
        assert isinstance(self.checkpoint_io, DurableCheckpointIO)
        return self.checkpoint_io

    def _later(self, work: Callable[..., None], *arguments: Any) -> None:
        self._ensure_setup()
        assert self._executor is not None
        before = self._latest

        def do() -> None:
            if before is not None:
                before.result()  # there is one thread: it is done; its error is this one's too
            work(*arguments)

        self._latest = self._executor.submit(do)


def make_durable(strategy: Strategy) -> None:
    """Have a strategy write durable checkpoints, unless it has a plugin of its own for them."""
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = DurableCheckpointIO()


def go_on_from(trainer: L.Trainer, folder: Path) -> Path | None:
    """The newest whole checkpoint of a run; none if it has none yet.

    Newer ones that are damaged are moved aside when the run starts, that is when all processes have chosen.

    Raises:
        ValueError: As ``choose``.
    """
    choice = choose(folder)
    for path, reason in choice.damaged.items():
        log.warning("%s is damaged: %s; going on from %s", path, reason, choice.checkpoint)
    if choice.damaged:
        trainer.callbacks.append(_MoveAside(list(choice.damaged)))
    return choice.checkpoint


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes had begun to write; nobody else may be writing."""
    for path in durable_file.leftovers(folder):
        log.info("removing %s, which was never finished", path)
        path.unlink()


def num_bytes(content: Any) -> int:
    """Bytes of all tensors in nested dictionaries and lists, each storage once."""
    found: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage._cdata] = storage.nbytes()
        return tensor

    apply_to_collection(content, Tensor, count)
    return sum(found.values())


class _MoveAside(L.Callback):
    """Renames damaged checkpoints once every process has seen them where they were."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Lightning has waited for all processes before this hook."""
        if trainer.is_global_zero:
            for path in self._paths:
                log.warning("%s is kept as %s", path, durable_file.move_aside(path).name)
        self._paths = []


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _system_error(error: BaseException | None) -> OSError | None:
    """The system's error behind one of torch's."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
