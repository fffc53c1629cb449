"""`python killed_fit.py STEP WORDS...`: what `illume WORDS` does, killed at the end of a training step."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2]))

import cli
from illume_lightning.lit.run_record import RunRecord

STEP = int(sys.argv[1])
count = RunRecord.on_train_batch_end


def die(self: RunRecord, trainer: Any, *others: Any) -> None:
    """Count as always, and in this step never return."""
    count(self, trainer, *others)
    if trainer.global_step == STEP:
        os.kill(os.getpid(), signal.SIGKILL)


RunRecord.on_train_batch_end = die  # type: ignore[method-assign]
cli.main(sys.argv[2:])
