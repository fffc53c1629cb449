"""Go back to the last checkpoint, and past what broke the run."""

import json
import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L

from illume_lightning.lit.sentinel import Divergence
from illume_lightning.lit.training import TrainingModule

log = logging.getLogger(__name__)


class Rollback(L.Callback):
    """Lets ``illume fit`` start again from the last checkpoint when a training step is not finite, and leave it out.

    What starts is the same as after a kill: all steps since the checkpoint are done again, bit for bit, up to those
    that are left out. These count, schedules and averages move on, and nothing is learned from them: data order and
    curriculum stay what they are. ``LossSpikes`` with ``stop_at`` makes it go back at spikes of the loss too.

    ``rollbacks.jsonl`` in the run's folder says what happened, and is what later starts go by: which steps, values and
    samples. Remove the file to have these steps back. The checkpoint has a copy, for a run that goes on in another
    folder.

    Args:
        max_rollbacks: of the whole run; the next time it stops.
        skip_steps: training steps that are left out each time: the one that failed and those before it, as the
            update that broke the weights is an earlier step's, if it was not the data.

    Raises:
        ValueError: if a number is out of range.
    """

    FILE = "rollbacks.jsonl"

    def __init__(self, max_rollbacks: int = 3, skip_steps: int = 2) -> None:
        for name, value in (("max_rollbacks", max_rollbacks), ("skip_steps", skip_steps)):
            if value < 1:
                raise ValueError(f"Rollback: {name} is {value}; give 1 or more, or leave the callback out")
        self.max_rollbacks, self.skip_steps = max_rollbacks, skip_steps
        self.records: list[dict[str, Any]] = []
        """One for each time that this run has gone back."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Read what happened before; the first process does, for all.

        Raises:
            ValueError: if the module can't leave steps out, or the file is none of ours.
        """
        if stage != "fit":
            return
        if not isinstance(pl_module, TrainingModule):
            raise ValueError(f"Rollback needs a TrainingModule, this is a {type(pl_module).__name__}")
        found = _read(self._file(trainer)) if trainer.is_global_zero else []
        self.records = trainer.strategy.broadcast(found)

    def state_dict(self) -> dict[str, Any]:
        """What happened so far."""
        return {"records": self.records}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Add what the folder does not know of."""
        known = {record["step"] for record in self.records}
        others = [record for record in state_dict["records"] if record["step"] not in known]
        self.records = sorted([*self.records, *others], key=lambda record: record["step"])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tell the module which steps to leave out."""
        module: Any = pl_module
        module.left_out = frozenset(step for record in self.records for step in record["left_out"])
        if self.records and trainer.is_global_zero:
            _write(self._file(trainer), self.records)
            steps = " ".join(str(step) for step in sorted(module.left_out))
            log.warning("training steps %s are left out, see %s", steps, self._file(trainer))

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Record it, and have the command start again."""
        if not isinstance(exception, Divergence):
            return
        if len(self.records) >= self.max_rollbacks:
            exception.args = (
                f"{exception} The run has gone back {len(self.records)} times before (max_rollbacks: "
                f"{self.max_rollbacks}), see {self._file(trainer)}: an earlier checkpoint (--ckpt_path) may be better.",
            )
            return
        checkpoint = getattr(trainer.checkpoint_callback, "last_model_path", "") or trainer.ckpt_path
        first = max(0, exception.step + 1 - self.skip_steps)
        record = {
            "step": exception.step,
            "why": str(exception),
            # JSON has no NaN.
            "values": {k: v if math.isfinite(v) else str(v) for k, v in exception.values.items()},
            "samples": exception.samples,
            "left_out": list(range(first, exception.step + 1)),
            "checkpoint": None if checkpoint is None else str(checkpoint),
        }
        if trainer.is_global_zero:
            _write(self._file(trainer), [*self.records, record])
            log.warning("going back to %s: %s", checkpoint or "the start", exception)
        exception.restarts = True

    def _file(self, trainer: L.Trainer) -> Path:
        return Path(trainer.default_root_dir) / self.FILE


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError as error:
        raise ValueError(f"{path} is not what Rollback writes ({error}): remove it") from error


def _write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """All or nothing: a kill in between leaves what was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    part.replace(path)
