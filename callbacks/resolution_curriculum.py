"""The progressive schedule of picture and batch sizes (paper 3.4, Table 1)."""

from dataclasses import asdict
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from illume_lightning.data.schedule import Phase, Schedule
from illume_lightning.lit.planned_data import replica


class ResolutionCurriculum(L.Callback):
    """Owns the phases of a run: picture sizes, batch sizes, and learning rates where they are given.

    Hands the phases to the datamodule; before every micro-batch sets `accumulation` (micro-batches in this
    training step) and `micro_batch` (number of this one within it) on the LightningModule, for its manual
    optimisation; logs `curriculum/phase` and `curriculum/side`. Everything changes at the exact training
    step, and the loggers' step is the training step, however many micro-batches it has.

    A run can go on with other phases from the resumed step on, and on another number of devices.

    Args:
        phases: in order; the last one ends at `trainer.max_steps`.

    Raises:
        ValueError: if the phases contradict themselves.
    """

    def __init__(self, phases: list[Phase]) -> None:
        self.schedule = Schedule(phases)
        self._world_size = 1
        self._phase: int | None = None

    def phase_at(self, step: int) -> Phase:
        """Phase of a training step.

        Raises:
            ValueError: if the run has no such step.
        """
        return self.schedule.phases[self.schedule.phase_index(step)]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check the phases against the trainer and the module, and hand them to the datamodule.

        Raises:
            ValueError: if they contradict each other; names the values and the way out.
        """
        if stage == "predict" and hasattr(trainer.datamodule, "set_curriculum"):
            trainer.datamodule.set_curriculum(self.schedule.phases)  # the MLLM makes the last one's sizes
        if stage != "fit":
            return
        self._world_size = replica(trainer)[1]
        self._phase = None
        accumulation = max(phase.accumulation(self._world_size) for phase in self.schedule.phases)
        if accumulation > 1 and pl_module.automatic_optimization:
            raise ValueError(
                f"the phases need {accumulation} micro-batches per training step, and "
                f"{type(pl_module).__name__} optimises automatically, once per micro-batch; set each phase's "
                "micro_batch_size to batch_size / devices, or use manual optimisation"
            )
        self._check_trainer(trainer)
        datamodule: Any = trainer.datamodule
        if not hasattr(datamodule, "set_curriculum"):
            raise ValueError(
                f"{type(datamodule).__name__} cannot follow a curriculum, as it has no set_curriculum; "
                "train with an ImageDataModule"
            )
        datamodule.set_curriculum(self.schedule.phases)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse learning rates from two places.

        Raises:
            ValueError: if phases have learning rates and there is a scheduler too.
        """
        if self.schedule.phases[0].lr is not None and trainer.lr_scheduler_configs:
            raise ValueError(
                "the phases set learning rates (lr), and so does a learning rate scheduler; keep only one"
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Bring module, optimizers and loggers to the phase of this micro-batch.

        Raises:
            RuntimeError: if the module does not count training steps as the schedule does.
        """
        place = self.schedule.locate(batch_idx, self._world_size)
        if place.step != trainer.global_step:
            raise RuntimeError(
                f"micro-batch {batch_idx} belongs to training step {place.step}, but trainer.global_step is "
                f"{trainer.global_step}: the module must count one optimizer step for each training step "
                f"of {place.accumulation} micro-batches"
            )
        module: Any = pl_module
        module.accumulation, module.micro_batch = place.accumulation, place.number
        loop = trainer.fit_loop.epoch_loop
        # Lightning's own counter, the x axis of all loggers, would count micro-batches.
        loop._batches_that_stepped = place.step
        if place.number == 0:
            # Lightning repeats what is not logged anew; a resumed run has nothing to repeat.
            for metric in loop._results.values():
                metric.has_reset |= metric.meta.name.startswith("train/")
        index = self.schedule.phase_index(place.step)
        phase = self.schedule.phases[index]
        if phase.lr is not None and index != self._phase:
            for optimizer in trainer.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = phase.lr
        self._phase = index
        pl_module.log("curriculum/phase", float(index), prog_bar=True)
        pl_module.log("curriculum/side", float(phase.side))

    def state_dict(self) -> dict[str, Any]:
        """The phases, and the number of the present one."""
        return {"phases": [asdict(phase) for phase in self.schedule.phases], "phase": self._phase}

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Check that the curriculum continues the checkpoint's, and point Lightning's counters at the plan.

        Raises:
            ValueError: if the part that has been trained differs.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            return
        step = checkpoint["global_step"]
        state = checkpoint["callbacks"].get(self.state_key)
        if state is None:
            raise ValueError(
                "the checkpoint was written without a ResolutionCurriculum and cannot be continued with one; "
                "take over its weights only"
            )
        if step > self.schedule.num_steps:
            raise ValueError(
                f"the checkpoint has {step} training steps, and the phases end at {self.schedule.num_steps}"
            )
        before = _trained([Phase(**phase) for phase in state["phases"]], step)
        now = _trained(self.schedule.phases, step)
        if before != now:
            raise ValueError(
                f"the phases of the {step} training steps in the checkpoint have changed, from {before} to "
                f"{now}; only what comes after step {step} can change"
            )
        # The number of micro-batches so far depends on devices and micro_batch_size, which may have changed,
        # and a checkpoint from within a training step goes back to that step's first micro-batch.
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        shift = self.schedule.first_micro_batch(step, self._world_size) - progress["current"]["processed"]
        for counts in (progress["current"], progress["total"]):
            for name in counts:
                counts[name] += shift
        progress["is_last_batch"] = False

    def _check_trainer(self, trainer: L.Trainer) -> None:
        if trainer.fast_dev_run:
            return
        if trainer.max_steps != self.schedule.num_steps:
            raise ValueError(
                f"the last phase ends at step {self.schedule.num_steps} and trainer.max_steps is "
                f"{trainer.max_steps}; set both to the same step"
            )
        wanted = {"max_epochs": -1, "accumulate_grad_batches": 1, "limit_train_batches": 1.0}
        reasons = {
            "max_epochs": "the schedule has no epochs",
            "accumulate_grad_batches": "accumulation comes from each phase's batch_size and micro_batch_size",
            "limit_train_batches": "the length of the run comes from the phases",
        }
        for name, value in wanted.items():
            if getattr(trainer, name) != value:
                raise ValueError(
                    f"trainer.{name} is {getattr(trainer, name)}; set it to {value}, as {reasons[name]}"
                )


def _trained(phases: Any, step: int) -> list[dict[str, Any]]:
    """What the phases say about the training steps before `step`, apart from how devices share the work."""
    trained, first = [], 0
    for phase in phases:
        if first < step:
            what = asdict(phase) | {"until_step": min(phase.until_step, step)}
            del what["micro_batch_size"]
            trained.append(what)
        first = phase.until_step
    return trained
