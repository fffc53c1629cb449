"""Metrics of a run as a table that a resumed run goes on with, whenever the one before was killed."""

import csv
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only


class MetricsLogger(CSVLogger):
    """Lightning's CSVLogger, of which the last start's table is that of the whole run.

    Every start has a folder ``version_<N>`` of its own, as Lightning's have. That of a resumed run begins with the
    rows up to the checkpoint, which ``ExactResume`` has it take over from the start that wrote the checkpoint: its
    table holds what an uninterrupted run's does, whenever the starts before were killed. Rows are on the disk as soon
    as they are logged. A table is replaced as a whole when it gets a new column, so that a kill never leaves a part.
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The table."""
        if self._experiment is None:
            os.makedirs(self.root_dir, exist_ok=True)
            self._experiment = _Table(log_dir=self.log_dir)
        return self._experiment

    @rank_zero_only
    def take_over(self, version: int | str, until: int) -> None:
        """Begin with an earlier start's rows; to be called before anything is logged.

        Args:
            version: of the start whose checkpoint the run goes on from; without a table there, nothing is taken over.
            until: training step from which on rows are logged again.
        """
        name = version if isinstance(version, str) else f"version_{version}"
        earlier = Path(self.root_dir, name, _Table.NAME_METRICS_FILE)
        if name == Path(self.log_dir).name or not earlier.is_file():
            return
        rows = [row for row in _read(earlier) if _is_whole(row)]
        self.experiment.metrics = [row for row in rows if int(row["step"]) < until]
        self.save()


class _Table(ExperimentWriter):
    """Replaces the file as a whole."""

    def save(self) -> None:
        """Append rows; the first ones of a table, or some with new columns, come with all others in a new file."""
        path = Path(self.metrics_file_path)
        if self.metrics and self._record_new_keys():
            rows = _read(path) if path.is_file() else []
            partial = path.with_name(path.name + ".partial")
            with partial.open("w", newline="") as stream:
                writer = csv.DictWriter(stream, self.metrics_keys)
                writer.writeheader()
                writer.writerows([*rows, *self.metrics])
            os.replace(partial, path)
            self.metrics = []
        super().save()


def _read(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def _is_whole(row: dict[str, Any]) -> bool:
    """Whether the row was written to its end."""
    return None not in row.values() and row["step"].isdigit()


def restart_curves(logger: TensorBoardLogger, until: int) -> None:
    """Have TensorBoard hide what an earlier start logged of a training step and those after it.

    Args:
        logger: of the resumed run.
        until: the first training step that is logged again.
    """
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    writer = logger.experiment.file_writer
    if writer is not None:
        writer.add_event(Event(step=until, session_log=SessionLog(status=SessionLog.START)))
