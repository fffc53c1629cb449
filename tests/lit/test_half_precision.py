"""Weights in bfloat16: every module trains and validates as with fp32 ones, to a few percent."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import test_diffusion_decoder_module as decoders
import test_dualvitok_module as dualvitoks
import test_mllm_stages as mllms
import torch
from test_mllm_stages import world  # noqa: F401  # a fixture
from tiny_trainer import trainer_for
from torch import Tensor

from illume_lightning.data.schedule import Phase
from illume_lightning.lit.datamodule import ImageDataModule, Source
from illume_lightning.lit.dualvitok import CodebookStart
from illume_lightning.lit.lora import LoRA
from illume_lightning.lit.mllm import MLLMStage1, MLLMStage3
from illume_lightning.lit.vision_encoder import VisionEncoderModule
from illume_lightning.nn.semantic import QwenVisionTower
from illume_lightning.nn.text_alignment import TextAlignment

Run = tuple[L.LightningModule, Any, list[Phase]]


def pictures(shapes: Path, **options: Any) -> ImageDataModule:
    given = {"val_sizes": [64], "val_limit": 4, "num_workers": 0, "horizontal_flip": 0.0} | options
    return ImageDataModule([Source(str(shapes / "train"))], val={"shapes": str(shapes / "val")}, **given)


def dualvitok(world: Path, shapes: Path, **options: Any) -> Run:  # noqa: F811
    return dualvitoks.build(**options), pictures(shapes), [Phase(2, "fixed", 64, 4, 4)]


def vision_encoder(world: Path, shapes: Path) -> Run:  # noqa: F811
    torch.manual_seed(0)
    model = TextAlignment(QwenVisionTower(1, 32, 2, 48), num_buckets=256, embed_dim=16)
    optimizer = {"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=2e-3)}
    return VisionEncoderModule(model, **optimizer), pictures(shapes), [Phase(2, "any_resolution", 64, 4, 4)]


def decoder(world: Path, shapes: Path) -> Run:  # noqa: F811
    return decoders.build(world / "dualvitok"), pictures(shapes), decoders.phases(2)


def stage1(world: Path, shapes: Path) -> Run:  # noqa: F811
    return mllms.build(world, MLLMStage1), mllms.data(world, *mllms.TASKS, cached=False), mllms.phases(2)


def stage3(world: Path, shapes: Path) -> Run:  # noqa: F811
    module = mllms.build(world, MLLMStage3, vit_from_layer=0, lora=LoRA(4, 8))
    return module, mllms.data(world, *mllms.TASKS, cached=False), mllms.phases(2)


PARTS: dict[str, Callable[[Path, Path], Run]] = {
    "dualvitok": dualvitok,
    "codebook start": lambda *folders: dualvitok(
        *folders, gan=False, codebook_start=CodebookStart(1, 0.1, 2)
    ),
    "vision encoder": vision_encoder,
    "decoder": decoder,
    "stage 1": stage1,
    "stage 3": stage3,
}


class Record(L.Callback):
    """What is logged, and the ids that an MLLM learns."""

    def __init__(self) -> None:
        self.before: dict[str, Tensor] = {}
        self.logged: dict[str, Tensor] = {}
        self.ids: list[Tensor] = []

    def on_fit_start(self, trainer: L.Trainer, module: Any) -> None:
        self.before = dualvitoks.weights(module)
        if hasattr(module, "tokenized"):
            tokenized = module.tokenized
            module.tokenized = lambda batch: self.ids.append(tokenized(batch)) or self.ids[-1]

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        for name, value in trainer.callback_metrics.items():
            self.logged[f"{name} {trainer.global_step}"] = value.clone()


def run(
    part: Run, precision: str, *callbacks: L.Callback, **options: Any
) -> tuple[Record, dict[str, float], L.LightningModule]:
    module, data, phases = part
    record = Record()
    given = {"num_sanity_val_steps": 0, "log_every_n_steps": 1} | options
    trainer = trainer_for(None, phases, record, *callbacks, precision=precision, **given)
    trainer.fit(module, data)
    found: dict[str, float] = {}
    for metrics in trainer.validate(module, data, verbose=False):
        found |= metrics
    return record, found, module


@pytest.mark.parametrize("name", PARTS)
def test_it_trains_as_fp32_does(name, world, shapes):  # noqa: F811
    expected, wanted, _ = run(PARTS[name](world, shapes), "32-true")
    record, found, module = run(PARTS[name](world, shapes), "bf16-true")
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert any(not torch.equal(value, module.state_dict()[key]) for key, value in record.before.items())
    losses = [key for key in expected.logged if "loss" in key]
    assert losses and expected.logged.keys() == record.logged.keys()
    for key in losses:
        assert record.logged[key].dtype == torch.float32
        torch.testing.assert_close(record.logged[key], expected.logged[key], rtol=0.05, atol=0.02, msg=key)
    assert found.keys() == wanted.keys()
    for key in (key for key in found if key.endswith(("loss", "psnr", "ssim", "cosine"))):
        assert found[key] == pytest.approx(wanted[key], rel=0.05, abs=0.02), key
    # The frozen tokenizer is not cast, and what it makes is what a cache has.
    assert all(map(torch.equal, record.ids, expected.ids))


def test_shards_are_cast_too(world, shapes):  # noqa: F811
    """FSDP2 on one device; its process group is left behind."""
    expected, _, _ = run(stage3(world, shapes), "bf16-true")
    try:
        record, _, module = run(stage3(world, shapes), "bf16-true", strategy="fsdp2", devices=1)
    finally:
        torch.distributed.destroy_process_group()
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert module.model.trunk.rotary_emb.inv_freq.dtype == torch.float32
    for key in (key for key in expected.logged if "loss" in key):
        torch.testing.assert_close(record.logged[key], expected.logged[key], rtol=1e-3, atol=1e-3, msg=key)
