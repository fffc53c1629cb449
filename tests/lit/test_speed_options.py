"""Options for speed change neither results nor checkpoints; what a device can't do is refused."""

from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import test_diffusion_decoder_module as decoders
import test_dualvitok_module as tokenizers
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from test_diffusion_decoder_module import tokenizer  # noqa: F401  # a fixture
from tiny_trainer import trainer_for
from torch import nn

from callbacks import TF32
from illume_lightning.data.plan import Phase
from illume_lightning.lit.memory_layout import follow_weights, use_channels_last
from illume_lightning.lit.speed_options import check_speed_options
from illume_lightning.lit.strategy import check_trainer_options
from illume_lightning.nn import parity
from illume_lightning.nn.losses import DualViTokLoss

PARTS = ("dualvitok", "decoder")
OPTIONS: dict[str, dict[str, Any]] = {
    "checkpoint": {"checkpoint_activations": True},
    "channels-last": {"channels_last": True},
    "fused": {"optimizer": partial(torch.optim.AdamW, lr=1e-3, fused=True)},
}
CONVOLUTION = {"dualvitok": "pixel_decoder.conv_out.weight", "decoder": "unet.conv_out.weight"}


class Record(L.Callback):
    """Losses of all steps, and the gradients of the first."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: dict[str, torch.Tensor] = {}

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, _: Any) -> None:
        for name, parameter in module.named_parameters():
            if trainer.global_step == 0 and parameter.grad is not None:
                self.gradients.setdefault(name, parameter.grad.clone())

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if module.is_last_micro_batch:
            self.losses.append(float(trainer.callback_metrics["train/loss"]))


def build(part: str, tokenizer: Path, **options: Any) -> L.LightningModule:  # noqa: F811
    options = {"optimizer": partial(torch.optim.AdamW, lr=1e-3)} | options
    if part == "dualvitok":
        return tokenizers.build(**options)
    module = decoders.build(tokenizer, **{k: v for k, v in options.items() if k != "optimizer"})
    module._optimizer = options["optimizer"]
    return module


def fit(
    part: str, module: L.LightningModule, shapes: Path, folder: Path, steps: int = 2, **options: Any
) -> Record:
    """Steps of two micro-batches, with clipping."""
    record, callbacks = Record(), options.pop("callbacks", ())
    if part == "dualvitok":
        tokenizers.fit(module, shapes, steps, micro=2, batch=4, callbacks=(record, *callbacks), **options)
        return record
    ckpt_path = options.pop("ckpt_path", None)
    trainer = trainer_for(folder, decoders.phases(steps, "fixed"), record, *callbacks, **options)
    trainer.fit(module, decoders.datamodule(shapes / "train"), ckpt_path=ckpt_path)
    return record


def assert_equal(
    one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float = 1e-6, rtol: float = 1e-3
) -> None:
    assert list(one) == list(other)
    for name, value in one.items():
        torch.testing.assert_close(
            other[name], value, atol=atol, rtol=rtol, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture(scope="module")
def plain(shapes, tokenizer, tmp_path_factory) -> dict[str, tuple[Record, dict[str, torch.Tensor]]]:  # noqa: F811
    results = {}
    for part in PARTS:
        module = build(part, tokenizer)
        record = fit(part, module, shapes, tmp_path_factory.mktemp("plain"))
        results[part] = record, tokenizers.weights(module)
    return results


def assert_as_plain(
    plain: tuple[Record, dict[str, torch.Tensor]], module: L.LightningModule, record: Record
) -> None:
    """Losses to 1e-4, gradients to 1e-3 of each; Adam makes up to its rate of differences of tiny gradients."""
    expected, weights = plain
    assert record.losses == pytest.approx(expected.losses, rel=1e-4)
    assert expected.gradients
    assert_equal(expected.gradients, record.gradients, atol=1e-5)
    assert_equal(weights, module.state_dict(), atol=2e-3)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("part", PARTS)
def test_an_option_changes_no_result(part, option, shapes, tokenizer, plain, tmp_path):  # noqa: F811
    module = build(part, tokenizer, **OPTIONS[option])
    assert_as_plain(plain[part], module, fit(part, module, shapes, tmp_path))


@pytest.mark.parametrize("part", PARTS)
def test_checkpoints_go_both_ways(part, shapes, tokenizer, tmp_path):  # noqa: F811
    """Fused updates, which go through weights and moments in the order of memory."""
    options = [OPTIONS["fused"], OPTIONS["fused"] | {"channels_last": True}]
    whole = {}
    for number, given in enumerate(options):
        module = build(part, tokenizer, **given)
        fit(part, module, shapes, tmp_path, steps=3, callbacks=(Save(tmp_path / f"{number}.ckpt", 1),))
        whole[number] = tokenizers.weights(module)
    for number, given in enumerate(reversed(options)):
        module = build(part, tokenizer, **given)
        fit(part, module, shapes, tmp_path, steps=3, ckpt_path=str(tmp_path / f"{number}.ckpt"))
        assert module.model.state_dict()[CONVOLUTION[part]].is_contiguous() == (number == 1)
        differences = [
            (value.float() - whole[number][name].float()).abs().flatten()
            for name, value in module.state_dict().items()
        ]
        # Adam may turn the sign of a few tiny gradients; mixed up moments move all weights by about its rate, 1e-3.
        assert torch.cat(differences).mean() < 2e-5


class Save(L.Callback):
    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


def test_moments_take_the_order_of_their_weights():
    """Unless they did, a fused update would give wrong weights without a word."""
    torch.manual_seed(0)
    given, gradient = torch.randn(2, 8, 4, 3, 3)
    optimizers = []
    for is_last in (False, True):
        layer = nn.Conv2d(4, 8, 3)
        layer.weight.data.copy_(given)
        if is_last:
            use_channels_last(layer)
        optimizer = follow_weights(torch.optim.AdamW([layer.weight], lr=0.1, fused=True))
        if is_last:
            optimizer.load_state_dict(deepcopy(optimizers[0][0].state_dict()))
            moments = optimizer.state[layer.weight]["exp_avg"]
            assert moments.is_contiguous(memory_format=torch.channels_last)
        layer.weight.grad = torch.empty_like(layer.weight).copy_(gradient)
        optimizers.append((optimizer, layer.weight))
        if not is_last:
            optimizer.step()
            layer.weight.data.copy_(given)
    for optimizer, _ in optimizers:
        optimizer.step()
    torch.testing.assert_close(optimizers[1][1], optimizers[0][1])


# -- compile --


@pytest.fixture
def traced(monkeypatch) -> Iterator[None]:
    """Graphs without kernels, which take a minute each."""
    compile = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile(self, backend="eager"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    """Graphs made so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("part", PARTS)
def test_compiled_networks_give_the_same(part, shapes, tokenizer, plain, tmp_path, traced):  # noqa: F811
    module = build(part, tokenizer, compile=True)
    assert list(module.state_dict()) == list(plain[part][1])
    before = graphs()
    assert_as_plain(plain[part], module, fit(part, module, shapes, tmp_path))
    assert graphs() - before == (2 if part == "dualvitok" else 1)
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
def test_the_curriculum_makes_few_graphs(shapes, traced):
    """One for the first size, one for all that follow; more are for batches and pictures that are special."""
    module = tokenizers.build(gan=False, compile=True, checkpoint_activations=True)
    phases = [
        Phase(1, "fixed", 64, 4, 4),
        Phase(2, "fixed", 96, 2, 2),
        Phase(8, "any_resolution", 160, 2, 2),
    ]
    before = graphs()
    tokenizers.fit(module, shapes, steps=8, phases=phases)
    assert graphs() - before <= 2 * 3, graphs() - before
    assert "recompile_limit" not in str(dict(torch._dynamo.utils.counters["unimplemented"]))


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_kernels_give_the_same(part, shapes, tokenizer, plain, tmp_path):  # noqa: F811
    module = build(part, tokenizer, compile=True)
    assert_as_plain(plain[part], module, fit(part, module, shapes, tmp_path))


@pytest.mark.slow
def test_averages_and_samples_of_a_compiled_decoder(shapes, tokenizer, tmp_path, traced):  # noqa: F811
    results = []
    for compiled in (False, True):
        module = build("decoder", tokenizer, compile=compiled, checkpoint_activations=compiled)
        fit("decoder", module, shapes, tmp_path, callbacks=(EMAWeightAveraging(decay=0.9),))
        images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
        results.append(module.eval().decode(module.encode(images), [0, 1]))
    torch.testing.assert_close(results[1], results[0], atol=2e-3, rtol=0)


def test_adaptive_weight_is_not_for_compiled_decoders():
    with pytest.raises(ValueError, match="adaptive_weight .* turn it or compile off"):
        tokenizers.DualViTokModule(
            tokenizers.build_tiny(),
            DualViTokLoss(perceptual_weight=0, adaptive_weight=True),
            discriminator=tokenizers.PatchDiscriminator(width=8, num_layers=2),
            compile=True,
        )


# -- fused updates --


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_fused_updates_are_clipped_in_low_precision(precision, shapes, tokenizer, tmp_path):  # noqa: F811
    norms = []
    for is_fused in (False, True):
        kind = partial(torch.optim.AdamW, lr=1e-3, fused=is_fused)
        module = build(
            "dualvitok", tokenizer, optimizer=kind, discriminator_optimizer=kind, gradient_clip=0.01
        )
        watch = tokenizers.Watch()
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if precision == "16-mixed" else None
        plugin = MixedPrecision(precision, "cpu", scaler)
        fit("dualvitok", module, shapes, tmp_path, callbacks=(watch,), plugins=[plugin])
        norms.append(watch.norms)
        assert max(watch.norms) <= 0.01 * 1.001
        norms.append([float(module.trainer.callback_metrics["train/generator_grad_norm"])])
    assert norms[2] == pytest.approx(norms[0], rel=1e-2)
    assert norms[3] == pytest.approx(norms[1], rel=1e-2)


# -- TF32 --


def flags() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.fixture
def ampere(monkeypatch) -> SimpleNamespace:
    """A trainer on a GPU that has TF32."""
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    return SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda")))


def test_tf32_lasts_as_long_as_the_run(ampere):
    before = flags()
    for is_on in (True, False):
        callback = TF32(is_on)
        callback.setup(ampere, None, "fit")
        callback.setup(ampere, None, "validate")
        assert flags() == (is_on, is_on)
        callback.teardown(ampere, None, "fit")
        assert flags() == before


def test_parity_stays_exact(ampere, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(parity, "_checks", lambda *_: seen.append(flags()) or [parity.Check("a", "b", 0.0)])
    callback = TF32()
    callback.setup(ampere, None, "fit")
    parity.run(tmp_path)
    assert seen == [(False, False)] and flags() == (True, True)
    callback.teardown(ampere, None, "fit")


def test_tf32_is_not_for_every_device(ampere, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match="TF32 is for NVIDIA GPUs from Ampere on, and this run is on cuda"):
        TF32().setup(ampere, None, "fit")
    ampere.strategy.root_device = torch.device("cpu")
    with pytest.raises(ValueError, match="this run is on cpu: leave it out"):
        TF32().setup(ampere, None, "fit")


# -- what a device can't do --


def given(**options: Any) -> dict[str, Any]:
    path = "illume_lightning.lit.diffusion_decoder.DiffusionDecoderModule"
    return {"class_path": path, "init_args": options}


def test_options_that_a_device_lacks(monkeypatch):
    check_speed_options("npu", given(checkpoint_activations=True, compile=False))
    for option in ("channels_last", "compile"):
        with pytest.raises(ValueError, match=rf"model\.{option} is not for NPUs.*: leave it out"):
            check_speed_options("npu", given(**{option: True}))
        check_speed_options("cpu", given(**{option: True}))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="there is no no-such-compiler: install one"):
        check_speed_options("cpu", given(compile=True))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (6, 1))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "GTX 1080")
    with pytest.raises(ValueError, match="from Volta on, and this is GTX 1080"):
        check_speed_options("cuda", given(compile=True))


def test_channels_last_is_not_for_sharded_weights():
    options = {"accelerator": "cpu", "devices": 2, "strategy": "fsdp2"}
    with pytest.raises(ValueError, match="channels_last is not for trainer.strategy fsdp2"):
        check_trainer_options(options, model=given(channels_last=True))
