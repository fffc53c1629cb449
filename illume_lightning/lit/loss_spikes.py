"""A record of training steps whose loss or gradient stood out, with the samples that they learned from."""

import json
import logging
import math
import os
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
from lightning.pytorch.core.optimizer import LightningOptimizer

from illume_lightning.lit.planned_data import PlannedDataModule, replica
from illume_lightning.lit.sentinel import Divergence

log = logging.getLogger(__name__)

LEAST = 64
"""Steps before the first one that is judged."""

SMALLEST_SPREAD = 0.02
"""Of the median: a smooth loss must not make noise a spike."""


class LossSpikes(L.Callback):
    """Writes a line of JSON to ``spikes.jsonl`` in the run's folder for each training step that stands out.

    A loss or gradient norm stands out if it is above the median of the last steps by many times their spread (the
    median distance from the median, scaled to a standard deviation). The steps looked back at are those since the
    loss has been made of what it is made of now: a new phase, the end of a warm-up or the start of the adversary begin
    anew. Values come from the sentinel, so no device is waited for. Every run of a ``TrainingModule`` has one, as
    nobody switches a recorder on before the accident.

    Args:
        deviations: spreads above the median from which on a step is recorded.
        window: training steps looked back at.
        stop_at: deviations of the loss from which on the run stops, or goes back with ``callbacks.Rollback``; by
            default it only records.

    Raises:
        ValueError: if a number is out of range.
    """

    FILE = "spikes.jsonl"

    def __init__(self, deviations: float = 20.0, window: int = 256, stop_at: float | None = None) -> None:
        for name, value in (("deviations", deviations), ("stop_at", stop_at)):
            if value is not None and not value > 0:
                raise ValueError(f"LossSpikes: {name} is {value}; give a positive number")
        if window < LEAST:
            raise ValueError(f"LossSpikes: window is {window}; look back at {LEAST} steps or more")
        self.deviations, self.window, self.stop_at = deviations, window, stop_at
        self._regime: list[Any] = []
        self._history: dict[str, deque[float]] = {}

    def state_dict(self) -> dict[str, Any]:
        """The steps looked back at."""
        return {
            "regime": self._regime,
            "history": {name: list(values) for name, values in self._history.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._regime = state_dict["regime"]
        self._history = {name: deque(values, self.window) for name, values in state_dict["history"].items()}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Drop lines of steps that are done again."""
        if trainer.is_global_zero:
            keep_before(Path(trainer.default_root_dir) / self.FILE, trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Judge a training step.

        Raises:
            Divergence: if the loss is beyond ``stop_at``, on all devices.
        """
        module: Any = pl_module
        step, sentinel = trainer.global_step - 1, module.sentinel
        if not module.is_last_micro_batch or sentinel.step != step:  # or it was left out
            return
        regime = [phase_of(trainer, step), *module.regime(step)]
        if regime != self._regime:
            self._regime, self._history = regime, {}
        watched = {name: value for name, value in sentinel.values.items() if name == "train/loss"}
        watched |= sentinel.gradient_norms
        found = {name: self._deviation(name, value) for name, value in watched.items()}
        if max(found.values(), default=0.0) > self.deviations and trainer.is_global_zero:
            self._write(trainer, module, found)
        for name, value in watched.items():
            if math.isfinite(value):  # fp16's overflows are not
                self._history.setdefault(name, deque(maxlen=self.window)).append(value)
        if self.stop_at is not None and found.get("train/loss", 0.0) > self.stop_at:
            self._stop(trainer, module, found["train/loss"])

    def _deviation(self, name: str, value: float) -> float:
        """Spreads above the median of the last steps; 0 while there are few."""
        history = self._history.get(name, ())
        if len(history) < LEAST or not math.isfinite(value):
            return 0.0
        middle = median(history)
        spread = 1.4826 * median(abs(other - middle) for other in history)
        return (value - middle) / max(spread, SMALLEST_SPREAD * abs(middle), 1e-12)

    def _write(self, trainer: L.Trainer, module: Any, found: dict[str, float]) -> None:
        sentinel = module.sentinel
        line = {
            "step": sentinel.step,
            "phase": self._regime[0],
            "deviations": {name: round(value, 1) for name, value in found.items() if value > self.deviations},
            "values": sentinel.values,
            "gradient_norms": sentinel.gradient_norms,
            "learning_rates": learning_rates(module.all_optimizers()),
            "samples": samples_of(trainer, sentinel.step) or sentinel.samples,
        }
        path = Path(trainer.default_root_dir) / self.FILE
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:  # a full disk: training matters more than its record
            log.warning("training step %d stands out, and can't be recorded: %s", sentinel.step, error)

    def _stop(self, trainer: L.Trainer, module: Any, deviation: float) -> None:
        step, values = module.sentinel.step, module.sentinel.values
        raise Divergence(
            f"the loss of training step {step} is {values['train/loss']:.4g}, {deviation:.0f} spreads above the "
            f"last steps' (stop_at: {self.stop_at}). See {self.FILE} in the run's folder, lower the learning rate, or "
            "leave such steps out with callbacks.Rollback.",
            step,
            values,
            samples_of(trainer, step) or module.gather_texts(module.sentinel.samples),
        )


def phase_of(trainer: L.Trainer, step: int) -> int | None:
    """Number of the phase of a training step; ``None`` where no curriculum decides what is read."""
    data = trainer.datamodule
    return data.plan.schedule.phase_index(step) if isinstance(data, PlannedDataModule) else None


def samples_of(trainer: L.Trainer, step: int) -> list[str]:
    """``dataset:index`` of a training step's samples, of all micro-batches and devices; none without a plan."""
    data = trainer.datamodule
    if not isinstance(data, PlannedDataModule):
        return []
    plan, devices = data.plan, replica(trainer)[1]
    phase = plan.schedule.phases[plan.schedule.phase_index(step)]
    found = []
    for micro_batch in range(phase.accumulation(devices)):
        for rank in range(devices):
            items = plan.batch(step, micro_batch, rank, devices)
            for row in getattr(items, "rows", [items]):  # packed conversations, or pictures
                found += [f"{item.dataset}:{item.index}" for item in row]
    return found


def learning_rates(optimizers: Iterable[LightningOptimizer]) -> dict[str, float]:
    """By the groups' names, or numbers."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return {str(group.get("name", number)): group["lr"] for number, group in enumerate(groups)}


def keep_before(path: Path, step: int) -> None:
    """Drop a file's lines of training steps from ``step`` on; a line that was cut off goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] >= step:
            break
        kept.append(line)
    part = path.with_name(f"{path.name}.part")
    part.write_text("".join(kept))
    os.replace(part, path)
