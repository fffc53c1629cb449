"""What every trained part shares: training steps by the curriculum's count, clipping, and a NaN sentinel."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from illume_lightning.lit.loss_spikes import LossSpikes
from illume_lightning.lit.processes import EndTogether
from illume_lightning.lit.same_arithmetic import SameArithmetic
from illume_lightning.lit.sentinel import Sentinel
from illume_lightning.nn.batch_norm import count_over_devices
from illume_lightning.nn.checkpoints import check_state_dict
from illume_lightning.nn.draws import SampleDraws


class TrainingModule(L.LightningModule):
    """Manual optimisation, in which ``trainer.max_steps``, ``global_step`` and schedules count training steps.

    A training step has as many micro-batches as the phase's batch size needs on this number of devices. Several
    devices do what one does with the same samples at once: gradients are means over devices, which all have equally
    many samples; batch norm counts over all of them; what is logged is a mean over all of them.

    Plain ``ddp`` is enough: every trained parameter gets a gradient in every backward pass, so DDP need not look for
    unused ones (``find_unused_parameters`` would go through the graph of every micro-batch).

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
        self._sums: dict[str, Tensor] = {}
        self.sentinel = Sentinel()
        self.left_out: Collection[int] = frozenset()
        """Training steps that count, and that nothing is learned from; ``callbacks.Rollback`` sets them."""
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

    def regime(self, step: int) -> list[bool]:
        """Which parts a training step's loss has, where that changes within a phase; no other steps compare with it."""
        return []

    def leaves_out(self) -> bool:
        """Whether this micro-batch belongs to a training step that is left out; the last one of it is counted."""
        if self.global_step not in self.left_out:
            return False
        if self.is_last_micro_batch:
            counter = self.all_optimizers()[0]
            counter._on_before_step()
            counter._on_after_step()
            self.step_schedules()
        return True

    def descend(self, loss: Tensor) -> None:
        """Backward of a micro-batch, and with the last one the step of all optimizers and their schedules."""
        self.backward_micro_batch(loss)
        if self.is_last_micro_batch:
            self.step_optimizers(self.all_optimizers())
            self.step_schedules()

    def backward_micro_batch(self, loss: Tensor, idle: Iterable[nn.Parameter] = ()) -> None:
        """Backward of a micro-batch; under DDP devices exchange gradients with the training step's last one only.

        Args:
            loss: of this micro-batch.
            idle: trained parameters that it does not depend on; they have no gradient afterwards either.
        """
        idle = list(idle)
        if idle and self.trainer.world_size > 1:
            # DDP waits for a gradient of each; zeros are one.
            loss = loss + 0 * torch.stack([parameter.sum() for parameter in idle]).sum()
        strategy = self.trainer.strategy
        is_silent = isinstance(strategy, ParallelStrategy) and not self.is_last_micro_batch
        with strategy.block_backward_sync() if is_silent else nullcontext():
            self.manual_backward(loss / self.accumulation)
        for parameter in idle:
            parameter.grad = None

    def average(self, tensor: Tensor) -> Tensor:
        """Mean over devices of a tensor without gradient, which every device has to ask for."""
        return self.trainer.strategy.reduce(tensor, reduce_op="mean")

    def gather_texts(self, texts: list[str]) -> list[str]:
        """All devices' texts, in the order of the devices; every device has to ask for them."""
        if self.trainer.world_size == 1:
            return texts
        gathered: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(gathered, texts)
        return [text for some in gathered for text in some]

    def draws(self, batch: Any) -> SampleDraws:
        """Generators of a batch's samples, by the data's seed and their ``sample_number``."""
        return SampleDraws(getattr(self.trainer.datamodule, "seed", 0), batch.sample_number.tolist())

    def log_means(self, values: Mapping[str, Tensor], on_bar: Collection[str] = ()) -> None:
        """Log scalars of a micro-batch as means over the training step: over its micro-batches and all devices.

        Devices exchange them once per training step, all in one tensor.

        Args:
            values: by name; the same names in every micro-batch of a step and on every device.
            on_bar: names that the progress bar shows.
        """
        if self.micro_batch == 0:
            self._sums = {}
        for name, value in values.items():
            share = value.detach().float() / self.accumulation
            self._sums[name] = self._sums[name] + share if name in self._sums else share
        if self.is_last_micro_batch:
            sums = list(self._sums.values())
            *means, broken = self.average(torch.stack([*sums, self.sentinel.broken(sums[0])]))
            self.sentinel.take(self._sums, torch.stack([*means, broken]))
            for name, mean in zip(self._sums, means, strict=True):
                self.log(name, mean, prog_bar=name in on_bar)

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
        """Clip here, and look at what the optimizer would learn from.

        In fp16 Lightning has unscaled the gradients by now, and not before.

        Raises:
            Divergence: if something of this training step is not finite.
        """
        self._unscale(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self.gradient_clip > 0:
            norm = nn.utils.clip_grad_norm_(parameters, self.gradient_clip)
        else:
            norm = nn.utils.get_total_norm([cast(Tensor, parameter.grad) for parameter in parameters])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        name = f"train/{self.gradient_norm_name(optimizer)}"
        self.log(name, norm)
        self.sentinel.look(self, name, norm, is_first=optimizer is self.all_optimizers()[0].optimizer)
        if self.sentinel.overflows:
            self.log("train/fp16_overflows", float(self.sentinel.overflows))

    @property
    def scales_losses(self) -> bool:
        """Whether fp16 scales losses up, so that gradients which are not finite only mean: too far up."""
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None and self._loss_scale() >= 1

    def _unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """fp16: Lightning leaves it to fused updates, which do it after clipping."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model in one sentence.

        Raises:
            ValueError: names the first weights that are missing, unexpected or of another shape.
        """
        if "state_dict" in checkpoint:  # FSDP2Strategy has read and checked it by now
            check_state_dict(self.state_dict(), checkpoint["state_dict"], str(self.trainer.ckpt_path))

    def require_finite(self, values: Mapping[str, Tensor], batch: Any) -> None:
        """Have it raise ``Divergence`` if they are NaN or infinite, on all devices and before an optimizer steps.

        Args:
            values: of this micro-batch, by name.
            batch: has ``dataset`` and ``index`` (B,), for the message.
        """
        self.sentinel.note(values, batch)

    def configure_callbacks(self) -> list[L.Callback]:
        """What every run needs, whatever its configuration says."""
        given = [callback for callback in self.trainer.callbacks if isinstance(callback, LossSpikes)]
        return [EndTogether(), SameArithmetic(), *([] if given else [LossSpikes()])]

    def on_fit_start(self) -> None:
        """Bring the fixed networks to the device, and batch norm to count over devices."""
        self.fixed.to(self.device)
        if self.trainer.world_size > 1:
            count_over_devices(self)
        if isinstance(self.trainer.strategy.model, DistributedDataParallel):
            # Buffers are equal at the start, and stay so: sending codebooks in every step would be in vain.
            self.trainer.strategy.model.broadcast_buffers = False

    def on_validation_model_zero_grad(self) -> None:
        """Keep the gradients of a training step that is not through, as validations are due by micro-batches."""
        if self.is_last_micro_batch:
            super().on_validation_model_zero_grad()

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
