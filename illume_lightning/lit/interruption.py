"""What a kill can take from a run beside the steps since its checkpoint: rows of metrics, and validations.

Lightning writes a checkpoint at the end of a training step, then logs the step, then validates. A run that is killed
in between goes on with the next step, and nobody misses the row or the validation.
"""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch.loggers import TensorBoardLogger

from illume_lightning.lit.metrics_logger import MetricsLogger, restart_curves
from illume_lightning.run_json import FINISHED, RUN_JSON, find_run_json


def logs_state(trainer: L.Trainer) -> dict[str, Any]:
    """What a checkpoint says about the logs.

    Returns:
        ``until``: all rows of training steps before it are logged; ``row``: what is yet to be logged of that step, or
        None; ``version``: of the MetricsLogger's table, or None.
    """
    connector = trainer._logger_connector
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    tables = [logger for logger in trainer.loggers if isinstance(logger, MetricsLogger)]
    version = tables[0].version if tables else None
    if not trainer.training or connector._first_loop_iter is None:  # the step is logged
        return {"until": step + 1, "row": None, "version": version}
    row = None
    if trainer.loggers and connector.should_update_logs:
        row = {**convert_tensors_to_scalars(connector.metrics["log"]), "epoch": trainer.current_epoch}
    return {"until": step, "row": row, "version": version}


def continue_logs(trainer: L.Trainer, state: dict[str, Any]) -> None:
    """Have the loggers go on behind the training step that a run is resumed at, whatever was logged since.

    Args:
        trainer: of the resumed run, before its first training step.
        state: from the checkpoint.
    """
    until = min(state["until"], trainer.global_step)
    for logger in trainer.loggers:
        if isinstance(logger, MetricsLogger) and state["version"] is not None:
            logger.take_over(state["version"], until)
        elif isinstance(logger, TensorBoardLogger):
            restart_curves(logger, until)
        # A step that was not through is logged when it is.
        if state["row"] is not None and until < trainer.global_step:
            logger.log_metrics(dict(state["row"]), until)
            logger.save()


def is_validation_due(trainer: L.Trainer) -> bool:
    """Whether the checkpoint that a run is resumed from was written right before a validation."""
    loop = trainer.fit_loop.epoch_loop
    if trainer.check_val_every_n_epoch is not None or not loop.restarted_on_train_batch_end:
        return False
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    return loop._should_check_val_fx(fetcher)


def validate(trainer: L.Trainer) -> None:
    """Validate before the first training step, as Lightning does after one."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False
    trainer.validating = True
    loop.run()
    trainer.training = True


def was_killed_at_the_end(trainer: L.Trainer, steps: int) -> bool:
    """Whether a run has made all its training steps, and has not come to its end; every process has to ask.

    Args:
        trainer: of the resumed run.
        steps: training steps in the checkpoint.
    """
    is_open = False
    root = Path(trainer.default_root_dir)
    if steps == trainer.max_steps and trainer.is_global_zero and (root / RUN_JSON).is_file():
        # Without a record that can be read nobody knows, and it counts as ended.
        record = find_run_json(root)
        is_open = record is not None and record["status"] != FINISHED
    return trainer.strategy.broadcast(is_open)
