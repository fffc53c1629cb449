"""What every training step was, as numbers on the host, and a stop before an optimizer steps on NaN or infinity."""

import gc
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from illume_lightning.lit.training import TrainingModule

_Run = TypeVar("_Run")

MOST_NAMED = 32
"""Samples that a message names; files name all."""


class Divergence(FloatingPointError):
    """A training step that must not be learned from; the same on all devices.

    Args:
        message: one line.
        step: training step.
        values: what was seen there, by name.
        samples: ``dataset:index`` of those that it was seen on, of all devices.
    """

    restarts = False
    """Whether the command goes on from the last checkpoint; ``callbacks.Rollback`` sets it."""

    def __init__(self, message: str, step: int, values: Mapping[str, float], samples: Sequence[str]) -> None:
        super().__init__(message)
        self.step, self.values, self.samples = step, dict(values), list(samples)


def as_often_as_asked(start: Callable[[], _Run]) -> _Run:
    """Start a run, and start it again as long as it ends in a ``Divergence`` that says so.

    Raises:
        Divergence: if it does not say so.
    """
    while True:
        try:
            return start()
        except Divergence as error:
            if not error.restarts:
                raise
        gc.collect()  # what failed, before the same is built once more


class _Noted(NamedTuple):
    """Values of a micro-batch, some of which may not be finite; the batch itself is not kept."""

    names: tuple[str, ...]
    is_finite: Tensor
    dataset: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    size: tuple[int, ...]

    def samples(self) -> list[str]:
        """As ``dataset:index``."""
        return [f"{d}:{i}" for d, i in zip(self.dataset.tolist(), self.index.tolist(), strict=True)]


class Sentinel:
    """Looks at the values and gradients of a training step before its optimizers step.

    The host waits for the device once for each optimizer, however many micro-batches and values there are. Devices
    need no message of their own to agree: whether something broke travels with the means that are logged, and
    gradients are everyone's.
    """

    def __init__(self) -> None:
        self.step = -1
        """The last training step that was looked at."""
        self.values: dict[str, float] = {}
        """Means of what was logged in that step, over its micro-batches and all devices."""
        self.gradient_norms: dict[str, float] = {}
        """Of that step's optimizers, before clipping, by the name they are logged as."""
        self.overflows = 0
        """Optimizer steps that fp16's loss scaling has left out, as it does to find its scale."""
        self._noted: list[_Noted] = []
        self._seen: list[_Noted] = []
        self._means: tuple[list[str], Tensor] | None = None

    @property
    def samples(self) -> list[str]:
        """``dataset:index`` of the last training step's samples on this device."""
        return list(dict.fromkeys(sample for noted in self._seen for sample in noted.samples()))

    def note(self, values: Mapping[str, Tensor], batch: Any) -> None:
        """Remember whether a micro-batch's values are finite, without waiting for the device."""
        is_finite = torch.stack([torch.isfinite(value).all() for value in values.values()])
        size = tuple(batch[0].shape[-2:])
        self._noted.append(_Noted(tuple(values), is_finite, batch.dataset, batch.index, size))

    def broken(self, like: Tensor) -> Tensor:
        """Number of values of this training step that are not finite on this device: () as ``like``."""
        flags = [noted.is_finite for noted in self._noted]
        return (~torch.cat(flags)).sum().to(like) if flags else like.new_zeros(())

    def take(self, names: Collection[str], means: Tensor) -> None:
        """Means over devices of a training step's values, and the mean of ``broken`` behind them."""
        self._means = list(names), means.detach()

    def look(self, module: "TrainingModule", name: str, norm: Tensor, is_first: bool) -> None:
        """Fetch what there is, and raise if it must not be learned from.

        Args:
            module: that is trained.
            name: of the gradient norm.
            norm: () of one optimizer's gradients.
            is_first: whether this optimizer is the first one to step.

        Raises:
            Divergence: names the values, the step and the samples.
        """
        norm = norm.detach().float()
        if is_first:
            names, means = self._means or ([], module.average(self.broken(norm)[None]))
            *found, broken, length = torch.cat([means, norm.to(means.device)[None]]).tolist()
            self.step, self.gradient_norms = module.global_step, {}
            self.values = dict(zip(names, found, strict=True))
            self._seen, self._noted, self._means = self._noted, [], None
            if broken > 0:
                self._raise_values(module)
        else:
            length = norm.item()
        self.gradient_norms[name] = length
        if math.isfinite(length):
            return
        if module.scales_losses:  # fp16 leaves the step out by itself
            self.overflows += 1
            return
        self._raise(f"the gradient ({name})", {name: length}, module.gather_texts(self.samples))

    def _raise_values(self, module: "TrainingModule") -> None:
        broken = [noted for noted in self._seen if not noted.is_finite.all()]
        names: list[str] = []
        for noted in broken[:1]:  # what comes behind it is a consequence
            flags = zip(noted.names, noted.is_finite.tolist(), strict=True)
            names = [name for name, is_finite in flags if not is_finite]
        samples = [sample for noted in broken for sample in noted.samples()]
        names, samples = (list(dict.fromkeys(module.gather_texts(texts))) for texts in (names, samples))
        self._raise(", ".join(names), dict.fromkeys(names, math.nan), samples)

    def _raise(self, what: str, values: Mapping[str, float], samples: list[str]) -> None:
        named = " ".join(samples[:MOST_NAMED]) + " ..." * (len(samples) > MOST_NAMED)
        raise Divergence(
            f"{what} is not finite at training step {self.step} (size {self._seen[-1].size if self._seen else ()}, "
            f"samples dataset:index {named}). No optimizer has stepped on it; the last checkpoint is good. Look at "
            "these pictures, or lower the learning rate, or use bf16-mixed instead of 16-mixed, or leave such steps "
            "out with callbacks.Rollback.",
            self.step,
            values,
            samples,
        )
