"""What every trained part shares: training steps by the curriculum's count, clipping, and a NaN sentinel."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from illume_lightning.nn.checkpoints import check_state_dict


class TrainingModule(L.LightningModule):
    """Manual optimisation, in which ``trainer.max_steps``, ``global_step`` and schedules count training steps.

    A training step has as many micro-batches as the phase's batch size needs on this number of devices.

    Args:
        gradient_clip: largest gradient norm of each optimizer's parameters; 0 turns clipping off.
    """

    accumulation: int = 1
    """Micro-batches in this training step; the resolution curriculum sets it."""

    micro_batch: int = 0
    """Number of this micro-batch within its training step; the resolution curriculum sets it."""

    def __init__(self, gradient_clip: float) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.gradient_clip = gradient_clip
        # Fixed networks stay out of the module tree: they have no place in checkpoints, DDP or EMA.
        self.fixed = FixedNetworks()

    @property
    def is_last_micro_batch(self) -> bool:
        """Whether the optimizers step after this one."""
        return self.micro_batch == self.accumulation - 1

    def all_optimizers(self) -> list[LightningOptimizer]:
        """The optimizers, also where there is only one."""
        optimizers = self.optimizers()
        return optimizers if isinstance(optimizers, list) else [optimizers]

    def descend(self, loss: Tensor) -> None:
        """Backward of a micro-batch, and with the last one the step of all optimizers and their schedules."""
        self.manual_backward(loss / self.accumulation)
        if self.is_last_micro_batch:
            self.step_optimizers(self.all_optimizers())
            self.step_schedules()

    def step_optimizers(self, optimizers: Sequence[LightningOptimizer]) -> None:
        """One training step by one or several optimizers, whose gradients are there."""
        scale = self._loss_scale()
        optimizers[0].step()
        optimizers[0].zero_grad()
        for optimizer in optimizers[1:]:
            _rescale(optimizer, self._loss_scale() / scale)
            with _uncounted(optimizer):
                optimizer.step()
            optimizer.zero_grad()

    def _loss_scale(self) -> float:
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return 1.0 if scaler is None else scaler.get_scale()

    def step_schedules(self) -> None:
        """Once per training step."""
        schedules = self.lr_schedulers()
        for schedule in schedules if isinstance(schedules, list) else [schedules]:
            if schedule is not None:
                schedule.step()

    def gradient_norm_name(self, optimizer: torch.optim.Optimizer) -> str:
        """What the gradient norm is logged as."""
        return "grad_norm"

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip here: in fp16 Lightning has unscaled the gradients by now, and not before."""
        if self.gradient_clip > 0:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            norm = nn.utils.clip_grad_norm_(parameters, self.gradient_clip)
            self.log(f"train/{self.gradient_norm_name(optimizer)}", norm)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model in one sentence.

        Raises:
            ValueError: names the first weights that are missing, unexpected or of another shape.
        """
        check_state_dict(self.state_dict(), checkpoint["state_dict"], str(self.trainer.ckpt_path))

    def require_finite(self, values: Mapping[str, Tensor], batch: Any) -> None:
        """Stop before an optimizer steps on NaN or infinity.

        Args:
            values: by name.
            batch: has ``dataset`` and ``index`` (B,), for the message.

        Raises:
            FloatingPointError: names the values, the training step and the samples.
        """
        broken = [name for name, value in values.items() if not torch.isfinite(value).all()]
        if broken:
            samples = [f"{d}:{i}" for d, i in zip(batch.dataset.tolist(), batch.index.tolist(), strict=True)]
            raise FloatingPointError(
                f"{', '.join(broken)} is not finite at training step {self.global_step} "
                f"(size {tuple(batch[0].shape[-2:])}, samples dataset:index {' '.join(samples)}). No "
                "optimizer has stepped on it; the last checkpoint is good. Look at these pictures, or lower "
                "the learning rate, or use bf16-mixed instead of 16-mixed."
            )

    def on_fit_start(self) -> None:
        """Bring the fixed networks to the device."""
        self.fixed.to(self.device)

    def on_validation_start(self) -> None:
        """Bring the fixed networks to the device."""
        self.fixed.to(self.device)

    def on_predict_start(self) -> None:
        """Bring the fixed networks to the device."""
        self.fixed.to(self.device)


class FixedNetworks(dict[str, nn.Module]):
    """Networks by name that are used and never trained; copies of a module share them."""

    def to(self, device: torch.device) -> None:
        """Bring all of them to a device."""
        for network in self.values():
            network.to(device)

    def __deepcopy__(self, memo: Any) -> "FixedNetworks":
        return self


@contextmanager
def _uncounted(optimizer: LightningOptimizer) -> Iterator[None]:
    """Lightning's ``global_step`` counts every optimizer's steps; a training step is the first one's alone."""
    hooks: tuple[Callable[[], None], Callable[[], None]] = (
        optimizer._on_before_step,
        optimizer._on_after_step,
    )
    optimizer._on_before_step = optimizer._on_after_step = lambda: None
    try:
        yield
    finally:
        optimizer._on_before_step, optimizer._on_after_step = hooks


def _rescale(optimizer: LightningOptimizer, ratio: float) -> None:
    """fp16: an earlier optimizer's step may have changed the loss scale that these gradients were made with."""
    if ratio != 1.0:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(ratio)
