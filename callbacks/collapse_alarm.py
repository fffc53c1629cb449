"""Alarms for the two ways in which a tokenizer's training goes wrong with a loss that looks fine."""

import logging
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor

from illume_lightning.lit.codebook_usage import health_of
from illume_lightning.lit.dualvitok import DualViTokModule

log = logging.getLogger(__name__)

TOKENS_PER_CODE = 10
"""Fewer tokens than this for each code say nothing about how many codes are in use."""


class Collapse(FloatingPointError):
    """A run that an alarm has stopped."""


class Alarm(L.Callback):
    """What alarms share: one warning for each event, a count in the log, and an end of the run where it is wanted.

    An event begins when something has been wrong for long enough, and ends when it is right again. Every training
    step that has an event before it logs ``alarm/<name>``, the number of events so far.

    Args:
        stop: end the run with an error, and its state in ``alarm-step=N.ckpt`` in the run's folder, apart from the
            checkpoints that a run goes on from.
    """

    def __init__(self, stop: bool) -> None:
        self.stop = stop
        self._events: dict[str, int] = {}
        self._since: dict[str, int] = {}

    def state_dict(self) -> dict[str, Any]:
        """Events so far, and for how long what is wrong has been wrong."""
        return {"events": dict(self._events), "since": dict(self._since)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._events, self._since = dict(state_dict["events"]), dict(state_dict["since"])

    def judge(
        self, trainer: L.Trainer, name: str, is_wrong: bool, patience: int, message: str, *values: object
    ) -> None:
        """Count a look at something, and raise the alarm when it was wrong ``patience`` times running.

        Raises:
            Collapse: if the run is to stop, on all devices.
        """
        self._since[name] = self._since.get(name, 0) + 1 if is_wrong else 0
        if self._since[name] != patience:
            return
        self._events[name] = self._events.get(name, 0) + 1
        text = f"{name} at training step {trainer.global_step}: {message % values}"
        if trainer.is_global_zero:
            log.warning("alarm: %s", text)
        if self.stop:
            path = Path(trainer.default_root_dir) / f"alarm-step={trainer.global_step}.ckpt"
            trainer.save_checkpoint(path)
            raise Collapse(f"{text}. The run's state is in {path}.")

    def log_events(self, module: L.LightningModule) -> None:
        """How often each alarm was raised, where one was."""
        for name, count in self._events.items():
            module.log(f"alarm/{name}", float(count))


class CodebookAlarm(Alarm):
    """Warns when a codebook falls out of use.

    Every so many training steps it looks at the codes that all devices have used since the last look. Plain VQ ended
    with 6.59 % of its codes in use and SimVQ with 100 % (paper, Table 8), healthy runs on shapes and emoji use 89 % and
    more with a perplexity of 37 % and more: the limits lie well between.

    Args:
        every_n_steps: training steps between two looks.
        usage: smallest share of codes in use.
        perplexity: smallest perplexity as a share of the codebook's size; it falls before codes die, when few of them
            do all the work.
        stop: end the run, see ``Alarm``.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self, every_n_steps: int = 1000, usage: float = 0.3, perplexity: float = 0.05, stop: bool = False
    ) -> None:
        super().__init__(stop)
        for name, share in (("usage", usage), ("perplexity", perplexity)):
            if not 0 <= share <= 1:
                raise ValueError(f"CodebookAlarm: {name} is {share}; give a share from 0 to 1")
        if every_n_steps < 1:
            raise ValueError(f"CodebookAlarm: every_n_steps is {every_n_steps}; give 1 or more")
        self.every_n_steps, self.usage, self.perplexity = every_n_steps, usage, perplexity
        self._seen: dict[str, Tensor] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse modules without codebooks."""
        _require_tokenizer(self, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The module counts from nothing afterwards."""
        self._seen = {}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look, if it is time.

        Raises:
            Collapse: if the run is to stop.
        """
        module: Any = pl_module
        if not module.is_last_micro_batch:
            return
        if trainer.global_step % self.every_n_steps == 0:
            for name, counted in module.codebook_usage.items():
                self._look(trainer, name, counted.counts)
        self.log_events(pl_module)

    def _look(self, trainer: L.Trainer, name: str, counts: Tensor) -> None:
        recent: Any = trainer.strategy.reduce(counts - self._seen.get(name, 0), reduce_op="sum")
        self._seen[name] = counts.clone()
        if recent.sum() < TOKENS_PER_CODE * len(recent):
            return
        health = health_of(recent)
        usage, share = float(health.usage), float(health.perplexity) / len(recent)
        self.judge(
            trainer,
            f"{name}_codebook",
            usage < self.usage or share < self.perplexity,
            1,
            "%.1f %% of %d codes in use in the last %d steps (limit %.0f %%), perplexity %.1f %% of them (limit "
            "%.0f %%). Start codebooks from data (model.codebook_start), lower the learning rate, take SimVQ, or make "
            "the codebook smaller",
            *(100 * usage, len(recent), self.every_n_steps, 100 * self.usage),
            *(100 * share, 100 * self.perplexity),
        )


class GANAlarm(Alarm):
    """Warns when one of the two adversaries has won.

    It watches, in every training step with an adversary, what is logged anyway: the hinge loss, which is 1 if the
    discriminator tells nothing apart and 0 if it tells everything apart with a margin of 1; both mean logits; and
    VQGAN's adaptive weight, which is cut off at 10,000. Only what stays wrong for ``patience`` steps is an event: a
    discriminator that has just begun knows nothing, and both sides have good and bad hours.

    Args:
        patience: training steps that something has to be wrong without a break.
        won: hinge loss below which the discriminator has won: the generator hardly learns from it.
        gap: difference of the mean logits below which it tells nothing apart.
        logits: absolute mean logits above which they run away.
        adaptive_weight: weight of the GAN loss above which it drowns the other losses.
        stop: end the run, see ``Alarm``.

    Raises:
        ValueError: if a number is not positive.
    """

    def __init__(
        self,
        patience: int = 1000,
        won: float = 0.05,
        gap: float = 1e-3,
        logits: float = 100.0,
        adaptive_weight: float = 1000.0,
        stop: bool = False,
    ) -> None:
        super().__init__(stop)
        limits = {"patience": patience, "won": won, "gap": gap, "logits": logits}
        for name, value in (limits | {"adaptive_weight": adaptive_weight}).items():
            if not value > 0:
                raise ValueError(f"GANAlarm: {name} is {value}; give a positive number")
        self.patience, self.won, self.gap = patience, won, gap
        self.logits, self.adaptive_weight = logits, adaptive_weight

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse modules without a discriminator."""
        _require_tokenizer(self, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the training step.

        Raises:
            Collapse: if the run is to stop.
        """
        module: Any = pl_module
        if not module.is_last_micro_batch:
            return
        if module.sentinel.step == trainer.global_step - 1:  # else it was left out
            self._look(trainer, module, module.sentinel.values)
        self.log_events(pl_module)

    def _look(self, trainer: L.Trainer, module: DualViTokModule, values: dict[str, float]) -> None:
        if "train/discriminator_loss" not in values:
            return
        hinge = values["train/discriminator_loss"] / module.loss.adversarial_weight
        real, fake = values["train/real_logits"], values["train/fake_logits"]
        self.judge(
            trainer,
            "discriminator_won",
            hinge < self.won,
            self.patience,
            "its hinge loss has been below %g for %d steps (now %.3g; logits %.3g real, %.3g fake). Lower "
            "model.discriminator_optimizer's rate, or model.loss.adversarial_weight",
            *(self.won, self.patience, hinge, real, fake),
        )
        self.judge(
            trainer,
            "discriminator_dead",
            abs(real - fake) < self.gap,
            self.patience,
            "its mean logits have been less than %g apart for %d steps (now %.3g real, %.3g fake). Raise "
            "model.discriminator_optimizer's rate, or start the adversary later (model.loss.adversarial_start)",
            *(self.gap, self.patience, real, fake),
        )
        self.judge(
            trainer,
            "logits",
            max(abs(real), abs(fake)) > self.logits,
            self.patience,
            "mean logits have been above %g for %d steps (now %.3g real, %.3g fake). Lower "
            "model.discriminator_optimizer's rate, or turn model.gradient_clip on",
            *(self.logits, self.patience, real, fake),
        )
        weight = values.get("train/adaptive_weight", 0.0)
        self.judge(
            trainer,
            "adaptive_weight",
            weight > self.adaptive_weight,
            self.patience,
            "it has been above %g for %d steps (now %.3g). Turn model.loss.adaptive_weight off, as the official "
            "release has it",
            *(self.adaptive_weight, self.patience, weight),
        )


def _require_tokenizer(alarm: Alarm, module: L.LightningModule) -> None:
    if not isinstance(module, DualViTokModule):
        raise ValueError(
            f"{type(alarm).__name__} is for DualViTokModule, this is a {type(module).__name__}: leave it out"
        )
