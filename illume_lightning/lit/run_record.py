"""The record of a run, ``run.json``: what it was made from and by, and how far it came."""

import logging
import math
import os
import platform
import resource
import socket
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from illume_lightning.data.packed_batch import PackedBatch
from illume_lightning.doctor import versions
from illume_lightning.lit.lineage import input_records, store_record
from illume_lightning.lit.planned_data import PlannedDataModule
from illume_lightning.lit.power import PowerMeter
from illume_lightning.lit.run_file import hash_text, weights_record, write_run_json
from illume_lightning.lit.same_arithmetic import facts
from illume_lightning.lit.saved_run import CONFIG
from illume_lightning.metric_values import hash_values, metric_files, read_values
from illume_lightning.provenance import code, machine
from illume_lightning.run_json import (
    FINISHED,
    INTERRUPTED,
    RUN_JSON,
    RUNNING,
    VERSION,
    identity,
    read_run_json,
)

log = logging.getLogger(__name__)

KILLED = "killed, or the machine went down"


class RunRecord(L.Callback):
    """Writes ``run.json`` to a fit's folder: when training begins, with every checkpoint and validation, and last.

    The file is there in full or not at all, whenever the process is killed. A run that is started again adds to
    ``starts`` and goes on counting. What changes with every step is counted without waiting for the device: samples
    by the plan, tokens on the device itself.

    Args:
        command: the words that the run was started with.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.command = list(command)
        self._record: dict[str, Any] = {}
        self._tokens: int | Tensor = 0
        self._trainer: L.Trainer | None = None
        self._meter = PowerMeter(())
        self._config_file = Path(CONFIG)
        self._began = 0.0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Note where the configuration is written; every process has to ask."""
        self._trainer = trainer
        self._config_file = Path(trainer.log_dir or trainer.default_root_dir) / CONFIG

    def state_dict(self) -> dict[str, Any]:
        """Tokens seen by all processes; every process has to call it."""
        return {"tokens": self._seen_tokens()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        assert self._trainer is not None
        self._tokens = state_dict["tokens"] if self._trainer.is_global_zero else 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write what the run is made from and by."""
        if not trainer.is_global_zero:
            return
        self._began = time.monotonic()
        self._meter = PowerMeter(_devices(trainer))
        earlier = self._earlier(Path(trainer.default_root_dir))
        config = self._config(Path(trainer.default_root_dir))
        made_by, stores = code(), _stores(trainer)
        inputs = input_records(config["resolved"], earlier.get("inputs", ()))
        hashes = [store["manifest_sha256"] for store in stores], [str(made["sha256"]) for made in inputs]
        found = identity(config["resolved"], made_by["source_sha256"], *hashes)
        data_seed = getattr(trainer.datamodule, "seed", None)
        self._record = {
            "version": VERSION,
            "identity": found,
            "status": RUNNING,
            "command": self.command,
            "config": config,
            "seeds": {"seed_everything": config["resolved"].get("seed_everything"), "data": data_seed},
            "code": made_by,
            "python": platform.python_version(),
            "packages": versions(),
            "hardware": _hardware(trainer),
            "stores": stores,
            "inputs": inputs,
            "weights": None,
            "starts": [*_ended(earlier.get("starts", [])), self._start(trainer, found, made_by)],
            # Of starts before this one.
            "peak_memory": earlier.get("peak_memory", {}),
        }
        self._write(trainer, self._seen_tokens(own=True))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count; the device adds, and nobody waits for it."""
        if isinstance(batch, PackedBatch):
            self._tokens = self._tokens + (batch.document_ids >= 0).sum()
        self._meter.sample()

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write how far the run is."""
        self._write(trainer, checkpoint["callbacks"][self.state_key]["tokens"])

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the metrics."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._write(trainer, self._seen_tokens())

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count all processes' tokens."""
        tokens = self._seen_tokens()
        if self._record:
            self._record["tokens"] = tokens

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Write why the run ends before its time."""
        if not self._record:
            return
        stopped = "SIGTERM" if isinstance(exception, SIGTERMException) else type(exception).__name__
        lines = str(exception).splitlines()
        self._record["starts"][-1]["ended"] = ": ".join([stopped, *lines[:1]])
        self._record["status"] = INTERRUPTED
        # Tokens as of the last checkpoint or validation: other processes can't be asked, nor a device that failed.
        try:
            self._write(trainer, self._record["tokens"])
        except OSError as error:  # such as a full disk, which may be why the run ends
            log.warning("%s could not be written: %s", RUN_JSON, error)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write what came out."""
        if not self._record:  # not the first process, or a run that was finished before
            return
        is_finished = trainer.max_steps < 0 or trainer.global_step >= trainer.max_steps
        self._record["status"] = FINISHED if is_finished else INTERRUPTED
        self._record["starts"][-1]["ended"] = self._record["status"]
        self._record["weights"] = weights_record(Path(trainer.default_root_dir))
        self._write(trainer, self._record["tokens"], with_series=True)

    def _write(self, trainer: L.Trainer, tokens: int, with_series: bool = False) -> None:
        """Bring the record up to date, in the first process; ``tokens``: of all."""
        if not self._record:
            return
        self._meter.sample(at_once=True)
        record, root = self._record, Path(trainer.default_root_dir)
        start = record["starts"][-1]
        start |= {
            "to_step": trainer.global_step,
            "seconds": round(time.monotonic() - self._began, 1),
            "joules": self._meter.joules,
        }
        joules = [other["joules"] for other in record["starts"] if other["joules"] is not None]
        record |= {
            "steps": trainer.global_step,
            "max_steps": trainer.max_steps,
            "samples": _samples(trainer),
            "tokens": tokens,
            "seconds": round(sum(other["seconds"] for other in record["starts"]), 1),
            "metrics": {name: _finite(float(value)) for name, value in trainer.callback_metrics.items()},
            "series": _series(root) if with_series else None,
            "peak_memory": _peak_memory(trainer, record["peak_memory"]),
            "energy": {"joules": sum(joules) if joules else None, "why": self._meter.why},
        }
        write_run_json(root, record)

    def _earlier(self, root: Path) -> dict[str, Any]:
        """The record of earlier starts; one that can't be read is put aside."""
        try:
            return read_run_json(root)
        except FileNotFoundError:
            return {}
        except ValueError as error:
            aside = root / f"{RUN_JSON}.unreadable"
            os.replace(root / RUN_JSON, aside)
            log.warning("%s; it is kept as %s, and a new record begins", error, aside)
            return {}

    def _config(self, root: Path) -> dict[str, Any]:
        """The configuration that was saved when this start was set up."""
        text = self._config_file.read_text()
        path = os.path.relpath(self._config_file, root)
        return {"path": path, "sha256": hash_text(text), "resolved": yaml.safe_load(text)}

    def _start(self, trainer: L.Trainer, found: str, made_by: dict[str, Any]) -> dict[str, Any]:
        return {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": socket.gethostname(),
            "command": self.command,
            "identity": found,
            "commit": made_by["commit"],
            "source_sha256": made_by["source_sha256"],
            "from_step": trainer.global_step,
            "to_step": trainer.global_step,
            "seconds": 0.0,
            "joules": None,
            "ended": None,
        }

    def _seen_tokens(self, own: bool = False) -> int:
        """Tokens of all processes, or of this one; the others' are added where all of them ask."""
        assert self._trainer is not None
        if own or self._trainer.world_size == 1:
            return int(self._tokens)
        device = self._trainer.strategy.root_device
        mine = torch.as_tensor(self._tokens, dtype=torch.int64, device=device)
        total = int(self._trainer.strategy.reduce(mine, reduce_op="sum"))
        # From here on the first process has them all.
        self._tokens = total if self._trainer.is_global_zero else 0
        return total


def _ended(starts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Earlier starts; one that did not say how it ended had no time to."""
    return [{**start, "ended": start["ended"] or KILLED} for start in starts]


def _devices(trainer: L.Trainer) -> list[torch.device]:
    """Of this machine."""
    return list(getattr(trainer.strategy, "parallel_devices", None) or [trainer.strategy.root_device])


def _hardware(trainer: L.Trainer) -> dict[str, Any]:
    module = torch.get_device_module(trainer.strategy.root_device.type)
    name = getattr(module, "get_device_name", None)
    devices = [name(device) if name else "cpu" for device in _devices(trainer)]
    return machine() | {
        "threads": torch.get_num_threads(),
        "devices": devices,
        "accelerator": trainer.strategy.root_device.type,
        "strategy": type(trainer.strategy).__name__,
        "precision": str(trainer.precision),
        "world_size": trainer.world_size,
        "num_nodes": trainer.num_nodes,
        "arithmetic": facts(trainer.strategy.root_device),
    }


def _stores(trainer: L.Trainer) -> list[dict[str, Any]]:
    data = trainer.datamodule
    return [store_record(store) for store in data.stores()] if isinstance(data, PlannedDataModule) else []


def _samples(trainer: L.Trainer) -> int | None:
    """Samples of all finished training steps, over all devices."""
    data = trainer.datamodule
    return (
        data.plan.schedule.first_sample(trainer.global_step) if isinstance(data, PlannedDataModule) else None
    )


def _series(root: Path) -> dict[str, Any] | None:
    files = metric_files(root)
    if not files:
        return None
    return {
        "paths": [str(file.relative_to(root)) for file in files],
        "sha256": hash_values(read_values(root)[0]),
    }


def _peak_memory(trainer: L.Trainer, earlier: dict[str, Any]) -> dict[str, Any]:
    """The most of any start so far, in bytes, of the first process."""
    # Linux counts in KiB.
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "device_bytes": None}
    device = trainer.strategy.root_device
    peak = getattr(torch.get_device_module(device.type), "max_memory_allocated", None)
    if peak is not None:
        found["device_bytes"] = peak(device)
    return {
        name: max((value for value in (now, earlier.get(name)) if value is not None), default=None)
        for name, now in found.items()
    }


def _finite(value: float) -> float | None:
    """JSON has no other numbers."""
    return value if math.isfinite(value) else None
