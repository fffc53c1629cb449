"""Nothing is learned from what is not finite: values and gradients, of all modules, micro-batches and devices."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from test_half_precision import PARTS
from test_mllm_stages import world  # noqa: F401  # a fixture
from tiny_trainer import trainer_for
from tiny_training import train

from illume_lightning.lit.sentinel import Divergence


class SpoilGradient(L.Callback):
    """Of one parameter, in training step 1."""

    def __init__(self, optimizer: int = -1) -> None:
        self.optimizer = optimizer
        self.before: dict[str, torch.Tensor] = {}

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        group = trainer.optimizers[self.optimizer].param_groups[0]
        parameter = next(p for p in group["params"] if p.requires_grad)
        parameter.register_hook(lambda gradient: gradient * torch.inf if trainer.global_step == 1 else None)

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == 1 and not self.before:
            self.before = {name: value.detach().clone() for name, value in module.named_parameters()}


@pytest.mark.parametrize("clip", [1.0, 0.0])
@pytest.mark.parametrize("name", ["dualvitok", "vision encoder", "decoder", "stage 3"])
def test_a_gradient_is_looked_at_in_every_module(name, clip, world, shapes):  # noqa: F811
    module, data, phases = PARTS[name](world, shapes)
    module.gradient_clip = clip
    spoil = SpoilGradient(optimizer=0)
    trainer = trainer_for(None, phases, spoil, num_sanity_val_steps=0, limit_val_batches=0)
    with pytest.raises(
        Divergence, match=r"the gradient \(train/.*grad_norm\) is not finite at training step 1"
    ) as caught:
        trainer.fit(module, data)
    assert len(caught.value.samples) >= 4
    assert spoil.before
    for key, value in module.named_parameters():
        assert torch.equal(value, spoil.before[key]), key


def test_the_discriminators_gradient_is_its_own(world, shapes):  # noqa: F811
    module, data, phases = PARTS["dualvitok"](world, shapes)
    trainer = trainer_for(None, phases, SpoilGradient(optimizer=1), limit_val_batches=0)
    with pytest.raises(Divergence, match=r"train/discriminator_grad_norm\) is not finite at training step 1"):
        trainer.fit(module, data)


@pytest.mark.parametrize("micro_batch", [0, 1])
def test_the_micro_batch_is_named(shapes: Path, tmp_path: Path, micro_batch: int) -> None:
    broken = {"nan_at": [2], "of_micro_batch": micro_batch}
    with pytest.raises(
        Divergence, match=r"^loss is not finite at training step 2 \(size \(32, 32\)"
    ) as caught:
        train(shapes, tmp_path, micro=2, module=broken, every=100)
    whole = train(shapes, tmp_path, steps=3, module={}, every=100)[0].sentinel.samples
    assert caught.value.samples == whole[2 * micro_batch : 2 * micro_batch + 2]
    assert " ".join(caught.value.samples) in str(caught.value)


def test_norms_are_logged_without_clipping_too(shapes: Path, tmp_path: Path) -> None:
    norms = []
    for clip in (0.0, 1e9):
        module, trainer = train(shapes, tmp_path / str(clip), steps=3, module={"gradient_clip": clip})
        norms.append(module.sentinel.gradient_norms["train/grad_norm"])
        assert float(trainer.callback_metrics["train/grad_norm"]) == norms[-1] > 0
        assert float(trainer.callback_metrics["train/loss"]) == module.sentinel.values["train/loss"]
    assert norms[0] == norms[1]


def fp16(scale: float) -> dict[str, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_fp16_finds_its_scale_and_says_how_often(shapes: Path, tmp_path: Path, clip: float) -> None:
    options = {"steps": 20, "every": 100, **fp16(2.0**28)}
    module, trainer = train(shapes, tmp_path, module={"gradient_clip": clip}, **options)
    assert trainer.global_step == 20
    assert 0 < module.sentinel.overflows < 20
    assert trainer.callback_metrics["train/fp16_overflows"] == module.sentinel.overflows
    assert all(torch.isfinite(value).all() for value in module.parameters())


def test_fp16_does_not_scale_down_for_ever(shapes: Path, tmp_path: Path) -> None:
    class Spoil(SpoilGradient):
        def on_fit_start(self, trainer: L.Trainer, module: Any) -> None:
            module.layer.weight.register_hook(lambda gradient: gradient * torch.nan)

    with pytest.raises(Divergence, match=r"grad_norm\) is not finite at training step 3 "):
        train(shapes, tmp_path, Spoil(), **fp16(4.0))
