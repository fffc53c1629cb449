"""A run of two processes, the second of which sees NaN: `python rollback_run.py SHAPES FOLDER`."""

import sys
from pathlib import Path

from tiny_training import train

from callbacks import Rollback

if __name__ == "__main__":
    shapes, folder = map(Path, sys.argv[1:])
    module, trainer = train(
        shapes, folder, Rollback(), micro=1, devices=2, strategy="ddp", module={"nan_at": [6], "of_rank": 1}
    )
    (folder / f"process{trainer.global_rank}").write_text(f"{module.trained} of {trainer.world_size}")
