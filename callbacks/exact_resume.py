"""Random number generators in the checkpoint: a resumed run equals an uninterrupted one bit for bit."""

import logging
import random
from typing import Any

import lightning as L
import numpy as np
import torch

log = logging.getLogger(__name__)


class ExactResume(L.Callback):
    """Saves the state of every random number generator of every process, and restores it on resuming.

    Python's, numpy's and torch's generators, and that of the device that the run trains on. The state is restored
    right before the first training batch, after everything else that draws numbers at the start.
    Validation is taken out in the same way: what it draws does not change training, so it makes no
    difference how often a run is validated, or whether it is killed before a validation or after.

    On another number of processes the run goes on with its freshly seeded generators, and says so.
    """

    def __init__(self) -> None:
        self._saved: list[dict[str, Any]] = []
        self._latest: dict[str, Any] | None = None
        self._pending: dict[str, Any] | None = None
        self._device = "cpu"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Note which device draws."""
        self._device = trainer.strategy.root_device.type

    def state_dict(self) -> dict[str, Any]:
        """The generators of all processes; every process has to call it."""
        mine = self._pending or _capture(self._device)
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return {"ranks": [mine]}
        ranks: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(ranks, mine)
        return {"ranks": ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the generators for the first training batch."""
        self._saved = state_dict["ranks"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Pick this process's generators."""
        self._latest = None
        saved, self._saved = self._saved, []
        if len(saved) == trainer.world_size:
            self._pending = saved[trainer.global_rank]
        elif saved:
            log.warning(
                "the checkpoint is of %d processes and there are %d: the data go on exactly, dropout and "
                "noise with fresh random numbers",
                len(saved),
                trainer.world_size,
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Restore the generators, after a resume or a validation."""
        if self._pending is not None:
            _restore(self._pending, self._device)
            self._pending = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember the generators, as a validation's loaders draw from them before anyone is told of it."""
        self._latest = _capture(self._device)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Mark the generators as those to go on with."""
        if self._pending is None:
            self._pending = self._latest


def _capture(device: str) -> dict[str, Any]:
    """All generators of this process, in types that a `weights_only` load accepts."""
    numpy_state: Any = np.random.get_state()
    name, keys, *rest = numpy_state
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
    }
    module = _device_module(device)
    if module is not None:
        state |= {"device": module.get_rng_state(), "device_type": device}
    return state


def _restore(state: dict[str, Any], device: str) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    module = _device_module(device)
    # Another kind of device draws by another rule.
    if module is not None and state.get("device_type") == device:
        module.set_rng_state(state["device"])


def _device_module(device: str) -> Any:
    """`torch.cuda`, `torch.npu`, ...; none of the CPU, and where there is no generator."""
    module = None if device == "cpu" else torch.get_device_module(device)
    return module if hasattr(module, "get_rng_state") else None
