"""Begin the first stage of the MLLM with a pretrained language model."""

import logging

import lightning as L

from illume_lightning.lit.mllm import MLLMStage
from illume_lightning.nn.mllm_checkpoints import load_qwen

logger = logging.getLogger(__name__)


class StartFromQwen(L.Callback):
    """Fill trunk and text rows from a plain Qwen2.5 when a fit starts from nothing.

    Vision rows get the initialisation that ``load_qwen`` documents. A resumed fit and ``validate`` take their weights
    from ``--ckpt_path``; this does nothing there.

    Args:
        folder: of the language model, as transformers saves it: ``config.json`` and safetensors.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Load, before strategies wrap the module.

        Raises:
            FileNotFoundError: there is no such model.
            ValueError: its sizes are not those of the MLLM.
        """
        if stage != "fit" or trainer.ckpt_path is not None:
            return
        if not isinstance(pl_module, MLLMStage):
            raise ValueError(f"StartFromQwen fills an MLLM stage, this is a {type(pl_module).__name__}")
        load_qwen(pl_module.model, self.folder)
        logger.info("started from %s", self.folder)
