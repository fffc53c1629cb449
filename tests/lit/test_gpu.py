"""What runs on NVIDIA GPUs; elsewhere these tests skip and say so."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import test_diffusion_decoder_module as decoders
import test_dualvitok_module as tokenizers
import test_mllm_stages as mllms
import torch
from test_diffusion_decoder_module import tokenizer  # noqa: F401  # a fixture
from test_mllm_stages import world  # noqa: F401  # a fixture
from tiny_run import write_dualvitok_run, write_mllm_run
from tiny_trainer import trainer_for

from callbacks import TF32
from illume_lightning import Illume
from illume_lightning.data.plan import Phase
from illume_lightning.data.text_tokenizer import TextTokenizer
from illume_lightning.lit.datamodule import ImageDataModule, Source
from illume_lightning.lit.mllm import MLLMStage1, MLLMStage2, MLLMStage3
from illume_lightning.nn.parity import run, table

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no NVIDIA GPU here"),
]

Fit = Callable[..., L.LightningModule]


def fit_on_cuda(
    module: L.LightningModule,
    data: L.LightningDataModule,
    phases: list[Phase],
    *callbacks: L.Callback,
    ckpt_path: Path | None = None,
    **options: Any,
) -> L.Trainer:
    # Some operations of the tokenizer have no deterministic gradient on GPUs.
    given = {"precision": "bf16-mixed", "deterministic": "warn"} | options
    trainer = trainer_for(
        None, phases, *callbacks, accelerator="cuda", devices=1, limit_val_batches=0, **given
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


@pytest.fixture(params=["dualvitok", "decoder", "stage 1", "stage 2", "stage 3"])
def fit(request, shapes, tokenizer, world) -> Fit:  # noqa: F811
    """Fits a part from the same start."""

    def start(*callbacks: L.Callback, steps: int = 4, **options: Any) -> L.LightningModule:
        speed = options.pop("speed", {})
        if request.param == "dualvitok":
            module: L.LightningModule = tokenizers.build(**speed)
            phases = [Phase(steps, "fixed", 64, 4, 2)]
            data: Any = ImageDataModule([Source(str(shapes / "train"))], val_sizes=[], num_workers=0)
        elif request.param == "decoder":
            module, phases = decoders.build(tokenizer, **speed), decoders.phases(steps)
            data = decoders.datamodule(shapes / "train")
        else:
            stage = {"1": MLLMStage1, "2": MLLMStage2, "3": MLLMStage3}[request.param[-1]]
            layers = {"vit_from_layer": 0} if stage is MLLMStage3 else {}
            speed = {name: value for name, value in speed.items() if name != "channels_last"}
            module, phases = mllms.build(world, stage, **layers, **speed), mllms.phases(steps)
            data = mllms.data(world, *mllms.TASKS)
        torch.manual_seed(7)
        fit_on_cuda(module, data, phases, *callbacks, **options)
        return module

    return start


class Seen(L.Callback):
    """Where everything is."""

    def __init__(self) -> None:
        self.devices: set[str] = set()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, _: Any) -> None:
        tensors = [*pl_module.parameters(), *pl_module.buffers()]
        tensors += [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
        self.devices |= {tensor.device.type for tensor in tensors}


def test_every_part_trains_in_bfloat16(fit):
    seen = Seen()
    module = fit(seen)
    assert seen.devices == {"cuda"}
    assert module.trainer.global_step == 4
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert all(value.float().isfinite().all() for value in module.state_dict().values())
    assert torch.isfinite(module.trainer.callback_metrics["train/loss"])


def test_every_part_trains_with_all_options_for_speed(fit):
    speed = {"checkpoint_activations": True, "channels_last": True, "compile": True}
    plain, fast = Losses(), Losses()
    fit(plain)
    fit(fast, TF32(), speed=speed)
    assert fast.found == pytest.approx(plain.found, rel=0.05)


class Losses(L.Callback):
    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if module.is_last_micro_batch:
            self.found.append(float(trainer.callback_metrics["train/loss"]))


def test_a_resumed_run_equals_an_uninterrupted_one(fit, tmp_path):
    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 2 and not (tmp_path / "cut.ckpt").exists():
                trainer.save_checkpoint(tmp_path / "cut.ckpt")

    whole = fit(Save())
    resumed = fit(ckpt_path=tmp_path / "cut.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize("precision", ["16-mixed", "32-true"])
def test_other_precisions_train(fit, precision):
    module = fit(steps=2, precision=precision)
    assert all(value.float().isfinite().all() for value in module.state_dict().values())


def test_generation(world, tmp_path):  # noqa: F811
    text = TextTokenizer(world / "text_tokenizer")
    write_mllm_run(tmp_path / "mllm", text, write_dualvitok_run(tmp_path / "dualvitok"))
    illume = Illume.from_run(tmp_path / "mllm", tmp_path / "dualvitok", device="cuda")
    assert illume.engine.device.type == "cuda"
    first, again = (illume.generate(["a red circle"], seeds=[3])[0] for _ in range(2))
    assert first.size == (32, 32)
    assert first.tobytes() == again.tobytes()


def test_fixtures_of_the_official_model(parity_dir):
    """Exactly, with TF32 on before."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        checks = run(parity_dir, "cuda")
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    missed = [check for check in checks if not check.passed]
    assert not missed, table(missed)
