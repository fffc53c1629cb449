"""What the model says and makes while it trains, scored as `illume evaluate` scores it."""

from typing import Any

import lightning as L

from callbacks.resolution_curriculum import ResolutionCurriculum
from illume_lightning.data.conversation_store import ConversationStore
from illume_lightning.data.schedule import Phase
from illume_lightning.evaluation.held_out import read_held_out
from illume_lightning.evaluation.mllm import ROOM, score_task
from illume_lightning.lit.illume import Illume, sizes_of
from illume_lightning.lit.tokenizer import load_tokenizer
from illume_lightning.nn.dualvitok import DualViTok


class GenerationScores(L.Callback):
    """Log ``val/<task>/<score>`` of answers and pictures at the end of validations, with the present weights.

    Every process makes the same ones. No generator of the run is drawn from.

    Args:
        limit: conversations of each validation task.
        every_n_validations: of a fit, those that are scored: every one, every second, and so on.
        tokenizer: DualViTok run, checkpoint or published file; by default the module's own. Without one only words
            are scored.

    Raises:
        ValueError: if a number is not positive.
    """

    def __init__(self, limit: int = 32, every_n_validations: int = 1, tokenizer: str | None = None) -> None:
        for name, value in (("limit", limit), ("every_n_validations", every_n_validations)):
            if value < 1:
                raise ValueError(f"{name} is {value}: give 1 or more")
        self.limit, self.every_n_validations, self.tokenizer = limit, every_n_validations, tokenizer
        self._validations = 0
        self._loaded: DualViTok | None = None

    def state_dict(self) -> dict[str, Any]:
        """Number of validations so far."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._validations = state_dict["validations"]

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Score every validation task."""
        if trainer.sanity_checking:
            return
        self._validations += 1
        if trainer.state.fn == "fit" and self._validations % self.every_n_validations:
            return
        datamodule: Any = trainer.datamodule
        module: Any = pl_module
        illume = self._illume(trainer, module)
        for name, task in datamodule.tasks["validate"].items():
            held_out = read_held_out(ConversationStore(task.path), self.limit)
            if illume.tokenizer is None:
                held_out.wishes = []
            for score in score_task(illume, name, held_out, seed=0, blind=False).scores:
                pl_module.log(f"val/{name}/{score.name}", score.value, rank_zero_only=False)

    def _illume(self, trainer: L.Trainer, module: Any) -> Illume:
        data: Any = trainer.datamodule
        sizes = sizes_of(_phase(trainer))
        options = {"release_prompts": data.release_prompts, "context": data.row_tokens + ROOM, "pack": False}
        return Illume(module.model, data.text_tokenizer, self._dualvitok(module), **sizes, **options)

    def _dualvitok(self, module: Any) -> DualViTok | None:
        if self.tokenizer is None:
            return module.fixed.get("tokenizer")
        if self._loaded is None:
            self._loaded = load_tokenizer(self.tokenizer).to(module.device)
        return self._loaded


def _phase(trainer: L.Trainer) -> Phase:
    """The phase that training is in; the last one where there is none.

    Raises:
        ValueError: if there is no curriculum.
    """
    for callback in trainer.callbacks:
        if isinstance(callback, ResolutionCurriculum):
            steps = callback.schedule.num_steps
            return callback.phase_at(
                min(trainer.global_step, steps - 1) if trainer.state.fn == "fit" else steps - 1
            )
    raise ValueError(
        "GenerationScores needs the phases to know the sizes of pictures: add ResolutionCurriculum"
    )
