"""Asked to end: by SIGTERM, or by the signal with which Slurm announces that a job's time is up."""

import logging
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from types import FrameType

import lightning as L
from lightning.fabric.plugins.environments import SLURMEnvironment

log = logging.getLogger(__name__)


class StopSignals:
    """Notes that a run is to end, for the end of its training step; a second SIGTERM ends it at once.

    Lightning would stop within a step, and with Slurm save from there.

    Args:
        trainer: While it trains; Lightning gives the signals back when it ends.
        is_saved: Whether nothing was trained since the last checkpoint: then a validation need not end first.
    """

    def __init__(self, trainer: L.Trainer, is_saved: Callable[[], bool]) -> None:
        self._trainer, self._is_saved = trainer, is_saved
        self._is_asked = self._requeues = False
        self._num_sigterm = 0
        if threading.current_thread() is not threading.main_thread():
            return  # only that one hears of signals
        signal.signal(signal.SIGTERM, self._note)
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            signal.signal(environment.requeue_signal, self._note)  # type: ignore[arg-type]

    def agreed(self) -> bool:
        """Whether any process was asked; all have to call it, at the end of the same training step."""
        return self._trainer.strategy.reduce_boolean_decision(self._is_asked, all=False)

    def stop(self) -> None:
        """Have Lightning end the run, which is saved by now."""
        if self._trainer.strategy.reduce_boolean_decision(self._requeues, all=False):
            self._requeue()
        self._trainer._signal_connector.received_sigterm = True

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._num_sigterm += number == signal.SIGTERM
        if self._num_sigterm > 1:
            self._end_at_once()
        if not self._is_asked:
            log.warning("%s: ending after this training step", signal.Signals(number).name)
        self._is_asked = True
        self._requeues |= number != signal.SIGTERM
        # Several processes have to agree, which they do where they all come by.
        if self._trainer.world_size == 1 and not self._requeues and self._is_saved():
            self._trainer._signal_connector.received_sigterm = True

    def _end_at_once(self) -> None:
        launcher = self._trainer.strategy.launcher
        if launcher is not None:
            launcher.kill(signal.SIGKILL)  # the other processes of this machine
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)

    def _requeue(self) -> None:
        """Ask Slurm to start the job again."""
        if not self._trainer.is_global_zero:
            return
        job, array = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_ARRAY_JOB_ID")
        if array is not None:
            job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        try:
            status = subprocess.run(["scontrol", "requeue", job]).returncode
        except OSError as error:
            log.warning("scontrol can't be started (%s): submit job %s again", error, job)
            return
        if status:
            log.warning("scontrol requeue %s ended with status %d: submit the job again", job, status)
