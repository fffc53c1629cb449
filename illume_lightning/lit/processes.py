"""The processes of a run end together, whichever of them fails."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import lightning as L
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import SIGTERMException

from illume_lightning.lit.sentinel import Divergence

GRACE = 2.0
"""Seconds in which a process that Lightning started leaves the word to the first one, which has the same error."""

LAST_WAIT = 60.0
"""Seconds that a failing process has to clean up in."""


class EndTogether(L.Callback):
    """Ends the processes of a machine when one of them fails, so that none waits for it for ever.

    Lightning starts one process for each device but the first, and looks every five seconds whether one of them
    ended with an error; then it kills the others. What it leaves open is closed here:

    - the first process fails: it kills the others;
    - another one fails, and its cleaning up waits for a device: it ends itself after a minute;
    - the first process is killed: the others end themselves.

    With several machines, the others notice by a broken connection, or by the timeout of the process group; torchrun
    and ``srun --kill-on-bad-exit`` end them at once.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Watch the process that started this one."""
        if trainer.local_rank > 0 and _is_started_by_python():
            threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """End the other processes, or leave that to the first one."""
        launcher = trainer.strategy.launcher
        if trainer.world_size == 1 or isinstance(exception, KeyboardInterrupt | SIGTERMException):
            return
        if isinstance(exception, Divergence) and exception.restarts:
            return  # all of them go on together
        if isinstance(launcher, _SubprocessScriptLauncher) and launcher.procs:
            launcher.kill(signal.SIGKILL)
        elif trainer.local_rank > 0:
            time.sleep(GRACE)
            timer = threading.Timer(LAST_WAIT, os._exit, (1,))
            timer.daemon = True
            timer.start()


def _is_started_by_python() -> bool:
    """Whether the parent runs the same interpreter, as Lightning's first process does, and a shell does not."""
    parent = Path(f"/proc/{os.getppid()}/exe")
    return parent.exists() and parent.resolve() == Path(sys.executable).resolve()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
