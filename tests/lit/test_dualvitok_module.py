"""Training DualViTok: counting, accumulation, precision, clipping, sentinels, resume, learning."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from tiny import build_tiny
from tiny_trainer import trainer_for

from illume_lightning.data.plan import Phase
from illume_lightning.lit.codebook_usage import CodebookUsage
from illume_lightning.lit.datamodule import ImageDataModule, Source
from illume_lightning.lit.dualvitok import CodebookStart, DualViTokModule, to_float, to_uint8
from illume_lightning.nn.discriminator import PatchDiscriminator
from illume_lightning.nn.losses import DualViTokLoss
from illume_lightning.nn.noise import TokenNoise


def build(seed: int = 0, adversarial_start: int = 0, gan: bool = True, **options: Any) -> DualViTokModule:
    torch.manual_seed(seed)
    loss = DualViTokLoss(
        perceptual_weight=0, adversarial_weight=0.5 * gan, adversarial_start=adversarial_start
    )
    discriminator = PatchDiscriminator(width=8, num_layers=2) if gan else None
    return DualViTokModule(
        build_tiny(noise=TokenNoise("random", 0.5, 0.2)), loss, discriminator=discriminator, **options
    )


def fit(
    module: DualViTokModule,
    shapes: Path,
    steps: int = 4,
    micro: int = 4,
    batch: int = 4,
    callbacks: tuple[L.Callback, ...] = (),
    phases: list[Phase] | None = None,
    ckpt_path: str | None = None,
    **options: Any,
) -> L.Trainer:
    phases = phases or [Phase(steps, "fixed", 64, batch, micro)]
    data = ImageDataModule(
        train=[Source(str(shapes / "train"))], val_sizes=[], num_workers=0, horizontal_flip=0.5
    )
    trainer = trainer_for(None, phases, *callbacks, **options)
    torch.manual_seed(7)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


def weights(module: L.LightningModule) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


class Watch(L.Callback):
    """Counts what really happens."""

    def __init__(self) -> None:
        self.batches = 0
        self.norms: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.batches += 1

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(self._record)

    def _record(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.norms.append(float(torch.stack([grad.norm() for grad in grads]).norm()))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_training_steps_are_counted_once(shapes: Path, accumulation: int) -> None:
    module = build(lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5))
    watch = Watch()
    trainer = fit(module, shapes, steps=6, micro=2, batch=2 * accumulation, callbacks=(watch,))
    assert trainer.global_step == 6
    assert watch.batches == 6 * accumulation
    for optimizer in trainer.optimizers:
        steps = {int(state["step"]) for state in optimizer.state.values()}
        assert steps == {6}
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4 * 0.5**3)


def test_a_validation_within_a_step_changes_nothing(shapes: Path) -> None:
    """Lightning clears gradients before it validates."""
    data = {"val": {"shapes": str(shapes / "val")}, "val_sizes": [32], "val_limit": 1, "num_workers": 0}
    found = []
    for interval in (1, 6):
        module = build()
        trainer = trainer_for(None, [Phase(2, "fixed", 32, 6, 2)], val_check_interval=interval,
                              check_val_every_n_epoch=None, num_sanity_val_steps=0)  # fmt: skip
        trainer.fit(module, ImageDataModule(train=[Source(str(shapes / "train"))], **data))
        found.append(weights(module))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_accumulation_equals_one_large_batch(shapes: Path) -> None:
    """Without a discriminator (its batch norm sees micro-batches) and noise, two micro-batches are one batch."""
    results = []
    for micro in (4, 2):
        module = build(gan=False)
        module.model.noise = None
        optimizer = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1)}
        module._optimizer = optimizer["optimizer"]
        fit(module, shapes, steps=2, micro=micro, batch=4)
        results.append(weights(module))
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, atol=2e-6, rtol=1e-4, msg=key)


def test_clipping_bounds_both_norms(shapes: Path) -> None:
    watch = Watch()
    fit(build(gradient_clip=0.01), shapes, steps=2, callbacks=(watch,))
    assert watch.norms
    assert max(watch.norms) <= 0.01 * 1.001


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_low_precision_trains(shapes: Path, precision: Any) -> None:
    module = build()
    before = weights(module)
    # As a plugin, since Lightning replaces fp16 by bf16 on the CPU.
    trainer = fit(module, shapes, steps=3, micro=2, batch=4, plugins=[MixedPrecision(precision, "cpu")])
    assert trainer.global_step == 3
    after = weights(module)
    assert all(torch.isfinite(value.float()).all() for value in after.values())
    for part in ("model.pixel_decoder.conv_out.weight", "discriminator.main.0.weight"):
        assert (after[part] - before[part]).abs().max() > 1e-6, part


def test_fp16_gradients_of_the_discriminator_survive_a_change_of_scale(shapes: Path) -> None:
    """The generator's step may double the loss scale that the discriminator's gradients were made with."""
    norms = {}
    for growth_interval in (1, 1000):
        watch = Watch()
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=growth_interval)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        fit(build(gradient_clip=0), shapes, steps=1, callbacks=(watch,), plugins=[plugin])
        assert scaler.get_scale() == (256.0 if growth_interval == 1 else 64.0)
        norms[growth_interval] = watch.norms
    assert norms[1] == pytest.approx(norms[1000], rel=1e-3)


def test_the_discriminator_waits_and_the_generator_leaves_it_alone(shapes: Path) -> None:
    module = build(adversarial_start=3)
    before = weights(module)
    fit(module, shapes, steps=3)
    after = weights(module)
    for key in before:
        if key.startswith("discriminator."):
            assert torch.equal(before[key], after[key]), key
    later = build(adversarial_start=2)
    fit(later, shapes, steps=3)
    key = "discriminator.main.0.weight"
    assert not torch.equal(before[key], later.state_dict()[key])
    assert all(parameter.requires_grad for parameter in later.discriminator.parameters())


def test_a_nan_names_its_batch_and_spares_the_weights(shapes: Path) -> None:
    class Poison(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                self.before = weights(module)
                module.model.pixel_decoder.conv_out.register_forward_hook(lambda m, i, out: out * torch.nan)
                self.indices = batch.index.tolist()

    module, poison = build(), Poison()
    with pytest.raises(FloatingPointError, match="training step 2") as caught:
        fit(module, shapes, steps=4, callbacks=(poison,))
    for index in poison.indices:
        assert f"0:{index}" in str(caught.value)
    for key, value in module.named_parameters():
        assert torch.equal(value, poison.before[key])


def test_codebooks_start_from_data(shapes: Path) -> None:
    module = build(gan=False, codebook_start=CodebookStart(2, 0.1, batches=3))
    random = module.model.pixel_quantizer.codebook.clone()
    fit(module, shapes, steps=2)
    torch.testing.assert_close(module.model.pixel_quantizer.codebook, random)
    module = build(gan=False, codebook_start=CodebookStart(2, 0.1, batches=3))
    fit(module, shapes, steps=3)
    codebook = module.model.pixel_quantizer.codebook
    assert (codebook - random).abs().max() > 1e-2
    images = torch.rand(4, 3, 64, 64) * 2 - 1
    latents = module.model.eval().latents(images)[0]["pixel"]
    spread = (latents.std(dim=(0, 2, 3)) / codebook.std(0)).log().abs().max()
    assert spread < 3, "the codes must lie where the latents do"


def test_resume_equals_the_uninterrupted_run(shapes: Path, tmp_path: Path) -> None:
    """Generator, discriminator, both optimizers, noise and data order; across a phase boundary."""
    phases = [Phase(3, "fixed", 64, 4, 2), Phase(6, "any_resolution", 96, 2, 2)]
    straight = build()
    fit(straight, shapes, steps=6, phases=phases)

    class StopAt(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "last.ckpt")
                trainer.should_stop = True

    fit(build(), shapes, steps=6, phases=phases, callbacks=(StopAt(),))
    resumed = build(seed=99)
    trainer = fit(
        resumed,
        shapes,
        steps=6,
        phases=phases,
        ckpt_path=str(tmp_path / "last.ckpt"),
    )
    assert trainer.global_step == 6
    for key, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


def test_it_learns(shapes: Path) -> None:
    module = build(gan=False, optimizer=lambda p: torch.optim.AdamW(p, lr=2e-3))
    losses: list[float] = []

    class Record(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            losses.append(float(trainer.callback_metrics["train/pixel_loss"]))

    fit(module, shapes, steps=60, micro=4, batch=4, callbacks=(Record(),))
    first, last = sum(losses[:5]) / 5, sum(losses[-10:]) / 10
    assert last < 0.4 * first


def test_contradictions_are_refused() -> None:
    with pytest.raises(ValueError, match="perceptual_weight is 1.0 and perceptual is missing"):
        DualViTokModule(build_tiny(), DualViTokLoss(adversarial_weight=0))
    with pytest.raises(ValueError, match="adversarial_weight is 0.5 and discriminator is missing"):
        DualViTokModule(build_tiny(), DualViTokLoss(perceptual_weight=0))


def test_codebook_usage_counts() -> None:
    usage = CodebookUsage(8)
    usage.update(torch.tensor([[0, 1], [2, 3]]))
    health = usage.compute()
    assert (float(health.usage), float(health.perplexity), int(health.dead)) == (0.5, pytest.approx(4.0), 4)
    usage.update(torch.zeros(1000, dtype=torch.long))
    assert usage.compute().perplexity < 1.1


def test_uint8_round_trip() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(to_uint8(to_float(images)), images)
    assert to_uint8(torch.tensor([[[[-3.0, 3.0]]]])).flatten().tolist() == [0, 255]
