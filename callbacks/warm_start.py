"""Hand weights over from an earlier stage."""

import logging
from pathlib import Path

import lightning as L
from torch import Tensor

from illume_lightning.nn.checkpoints import check_state_dict, read_state_dict

logger = logging.getLogger(__name__)


class WarmStart(L.Callback):
    """Fill parts of a module from a checkpoint, strictly, when a fit starts from nothing.

    A resumed fit and ``validate``, ``test`` or ``predict`` take their weights from ``--ckpt_path``; this does
    nothing there.

    Args:
        checkpoint: of an earlier stage, a file or a folder of FSDP2's, or published weights.
        prefixes: prefix in the file -> prefix in the module; every weight of the module under the second
            comes from the first. The empty prefix stands for everything. Prefixes of Lightning checkpoints
            count from inside their ``model``.
    """

    def __init__(self, checkpoint: str, prefixes: dict[str, str]) -> None:
        self.checkpoint = checkpoint
        self.prefixes = prefixes

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Load, before strategies wrap the module.

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: a weight is missing or has another shape; the message names the first ones.
        """
        if stage != "fit" or trainer.ckpt_path is not None:
            return
        if not Path(self.checkpoint).exists():
            raise FileNotFoundError(
                f"WarmStart: no checkpoint at {self.checkpoint}: run the stage that writes it first, or set "
                "the callback's checkpoint."
            )
        state = read_state_dict(self.checkpoint)
        own = pl_module.state_dict()
        for source, target in self.prefixes.items():
            given = _below(state, source)
            wanted = _below(own, target)
            check_state_dict(wanted, given, f"{self.checkpoint} ({source or 'all'} -> {target or 'all'})")
            pl_module.load_state_dict({target + key: value for key, value in given.items()}, strict=False)
            logger.info("warm start: %d tensors %s -> %s", len(given), source or "all", target or "all")


def _below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
