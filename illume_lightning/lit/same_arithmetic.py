"""Says when a resumed run computes with other rounding than the run that it continues."""

import logging
from typing import Any

import lightning as L
import torch

log = logging.getLogger(__name__)


class SameArithmetic(L.Callback):
    """Keeps in the checkpoint what the last bits of a result depend on, and warns on resuming where it differs.

    A run goes on all the same: it is as good as the other, and not bit for bit the same. On a CPU the number of threads
    decides in which order sums are added up; so do instruction set, device, version of torch, and whether kernels
    are deterministic.
    """

    def __init__(self) -> None:
        self._facts: dict[str, str] = {}
        self._saved: dict[str, str] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Look at this process."""
        self._facts = facts(trainer.strategy.root_device)

    def state_dict(self) -> dict[str, Any]:
        """What there is."""
        return dict(self._facts)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what was."""
        self._saved = dict(state_dict)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare."""
        saved, self._saved = self._saved, {}
        other = [
            f"{name} {saved[name]} there and {now} here"
            for name, now in self._facts.items()
            if name in saved and saved[name] != now
        ]
        if other and trainer.is_global_zero:
            log.warning(
                "the run goes on, and not bit for bit as the one that wrote the checkpoint would: %s",
                "; ".join(other),
            )


def facts(device: torch.device) -> dict[str, str]:
    """What the last bits of results on a device depend on, by names for a message."""
    on_cpu = device.type == "cpu"
    found = {
        "device": torch.backends.cpu.get_cpu_capability() if on_cpu else _name(device),
        "torch": str(torch.__version__),
        "deterministic kernels": _deterministic(),
    }
    return found | ({"threads (OMP_NUM_THREADS)": str(torch.get_num_threads())} if on_cpu else {})


def _deterministic() -> str:
    if not torch.are_deterministic_algorithms_enabled():
        return "off"
    return "where there are" if torch.is_deterministic_algorithms_warn_only_enabled() else "on"


def _name(device: torch.device) -> str:
    module = torch.get_device_module(device)
    return str(module.get_device_name(device)) if hasattr(module, "get_device_name") else device.type
