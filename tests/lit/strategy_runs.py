"""Small trainings that give the same result on any number of devices; run as a script, on several processes.

`python strategy_runs.py DEVICES WORLD OUT NAME...` fits one after the other and writes what came out.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import test_diffusion_decoder_module as decoders
import test_mllm_stages as mllms
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from tiny import build_tiny
from tiny_trainer import trainer_for
from torch import Tensor

from illume_lightning.data.schedule import Phase
from illume_lightning.lit.datamodule import ImageDataModule, Source
from illume_lightning.lit.dualvitok import CodebookStart, DualViTokModule
from illume_lightning.lit.mllm import MLLMStage, MLLMStage1, MLLMStage2, MLLMStage3
from illume_lightning.lit.vision_encoder import VisionEncoderModule
from illume_lightning.nn.condition import ConditionNoise
from illume_lightning.nn.discriminator import PatchDiscriminator
from illume_lightning.nn.losses import DualViTokLoss
from illume_lightning.nn.noise import TokenNoise
from illume_lightning.nn.semantic import QwenVisionTower
from illume_lightning.nn.text_alignment import TextAlignment

BATCH = 12
STEPS = 3

Result = dict[str, Tensor]


class Record(L.Callback):
    """Logged training values and samples of every step, and the gradients of the first one."""

    def __init__(self) -> None:
        self.found: Result = {}
        self._samples: list[list[int]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        if trainer.global_step == 0:
            for name, parameter in module.named_parameters():
                if parameter.grad is not None:
                    self.found[f"gradient of {name}"] = whole(parameter.grad)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._samples += torch.stack([batch.sample_number, batch.dataset, batch.index], dim=1).tolist()
        if module.is_last_micro_batch:
            self.found[f"samples of step {trainer.global_step}"] = torch.tensor(
                sorted(self._everyones(trainer))
            )
            self._samples = []
            for name, value in trainer.callback_metrics.items():
                if not name.startswith("curriculum"):
                    self.found[f"{name} after {trainer.global_step}"] = whole(value)

    def _everyones(self, trainer: L.Trainer) -> list[list[int]]:
        """Samples of all devices."""
        if trainer.world_size == 1:
            return self._samples
        gathered: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(gathered, self._samples)
        return [sample for samples in gathered for sample in samples]


def whole(tensor: Tensor) -> Tensor:
    """Of all devices, apart from the original."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def train(
    module: L.LightningModule,
    data: Any,
    phases: list[Phase],
    devices: int,
    strategy: str = "ddp",
    callbacks: tuple[L.Callback, ...] = (),
    ckpt_path: str | None = None,
    precision: Any = "32-true",
) -> Result:
    record = Record()
    trainer = trainer_for(
        None,
        phases,
        record,
        *callbacks,
        devices=devices,
        strategy=strategy if devices > 1 or "fsdp" in strategy else "auto",
        precision=precision,
        log_every_n_steps=1,
        deterministic=False,
    )
    # Neither initial nor later draws of the processes' own generators may make a difference.
    torch.manual_seed(100 + trainer.global_rank + 10 * devices)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return record.found | {name: whole(value) for name, value in module.state_dict().items()}


def sgd(parameters: Any, lr: float = 0.05) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def smooth_adam(parameters: Any) -> torch.optim.Optimizer:
    """The large epsilon keeps rounding of tiny gradients from becoming whole steps."""
    return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-2)


def images(world: Path, mixture: bool = True) -> ImageDataModule:
    stores = [Source(str(world / "shapes" / "train"), 0.7), Source(str(world / "shapes" / "val"), 0.3)]
    return ImageDataModule(
        train=stores if mixture else stores[:1], val_sizes=[], num_workers=0, horizontal_flip=0.5
    )


def dualvitok(world: Path, devices: int, accumulation: int = 1, ema: bool = False, **options: Any) -> Result:
    """Both optimizers, the adversary from step 1, noise, buckets and a mixture; codes are counted."""
    torch.manual_seed(0)
    loss = DualViTokLoss(
        perceptual_weight=0,
        adversarial_weight=0.5,
        adversarial_start=1,
        adaptive_weight=True,
        foreground_weight=4,
    )
    options = {"optimizer": sgd, "discriminator_optimizer": sgd} | options
    module = DualViTokModule(
        build_tiny(noise=TokenNoise("random", 0.5, 0.2)),
        loss,
        None,
        PatchDiscriminator(width=8, num_layers=2),
        **options,
    )
    run = [Phase(STEPS, "any_resolution", 64, BATCH, BATCH // devices // accumulation)]
    callbacks = (EMAWeightAveraging(decay=0.5),) if ema else ()
    found = train(module, images(world), run, devices, callbacks=callbacks)
    for name, usage in module._usage.items():
        found[f"{name} codes"] = usage.compute().perplexity
    return found


def codebook_start(world: Path, devices: int) -> Result:
    """A warm-up without quantisers, then codebooks from data of all devices."""
    torch.manual_seed(0)
    loss = DualViTokLoss("l2", perceptual_weight=0, adversarial_weight=0)
    module = DualViTokModule(
        build_tiny(), loss, optimizer=sgd, codebook_start=CodebookStart(1, 0.1, batches=2)
    )
    return train(module, images(world), [Phase(STEPS, "fixed", 64, BATCH, BATCH // devices)], devices)


def vision_encoder(world: Path, devices: int) -> Result:
    """Captions and regions, among the words of the whole batch."""
    torch.manual_seed(0)
    model = TextAlignment(QwenVisionTower(1, 32, 2, 48), num_buckets=256, embed_dim=16)
    data = images(world)
    data.horizontal_flip = 0.0
    run = [Phase(STEPS, "any_resolution", 64, BATCH, BATCH // devices)]
    return train(VisionEncoderModule(model, partial(sgd, lr=1e-2)), data, run, devices)


def decoder(world: Path, devices: int, strategy: str = "ddp") -> Result:
    """Wrong codes, missing branches, timesteps and noise of every sample's own."""
    noise = ConditionNoise(0.5, 0.3, 0.3, 0.3)
    module = decoders.build(world / "dualvitok", noise=noise)
    module._optimizer = sgd
    run = [Phase(STEPS, "multi_ratio", 64, BATCH, BATCH // devices, size_step=32)]
    return train(module, decoders.datamodule(world / "shapes" / "train"), run, devices, strategy)


def mllm(
    world: Path,
    devices: int,
    stage: type[MLLMStage],
    tasks: tuple[str, ...] = mllms.TASKS,
    strategy: str = "ddp",
    accumulation: int = 2,
    optimizer: Callable[..., Any] = torch.optim.SGD,
    lr: float = 0.05,
    steps: int = STEPS,
    checkpoint_activations: bool = False,
    **options: Any,
) -> Result:
    """Packed rows of a mixture: devices have different numbers of tokens and of pictures."""
    given: dict[str, Any] = {"vit_from_layer": 0} if stage is MLLMStage3 else {}
    given |= {"optimizer": optimizer, "checkpoint_activations": checkpoint_activations}
    module = mllms.build(world, stage, lr=lr, **given)
    run = mllms.phases(steps, BATCH, BATCH // devices // accumulation)
    return train(module, mllms.data(world, *tasks, row_tokens=256), run, devices, strategy, **options)


class SaveAt(L.Callback):
    """Saves after a step, and stops there if told to."""

    def __init__(self, path: Path, step: int = 2, stop: bool = False) -> None:
        self.path, self.step, self.stop = path, step, stop

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step and module.is_last_micro_batch:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = self.stop


resumable = partial(mllm, stage=MLLMStage3, optimizer=smooth_adam, lr=1e-2, steps=4)
"""Frozen and trained parts mixed, with moments and step counts to restore."""

DDP = {
    "dualvitok": dualvitok,
    "dualvitok in two micro-batches": partial(dualvitok, accumulation=2, ema=True),
    "codebook start": codebook_start,
    "vision encoder": vision_encoder,
    "decoder": decoder,
    "stage 1": partial(mllm, stage=MLLMStage1),
    "stage 2": partial(mllm, stage=MLLMStage2, accumulation=1),
    "stage 3": partial(mllm, stage=MLLMStage3),
    "stage 3 on text": partial(mllm, stage=MLLMStage3, tasks=("text",)),
}
FSDP2 = {
    "decoder": partial(decoder, strategy="fsdp2"),
    "stage 1": partial(mllm, stage=MLLMStage1, strategy="fsdp2"),
    "stage 3": partial(mllm, stage=MLLMStage3, strategy="fsdp2", checkpoint_activations=True),
    "bf16": partial(mllm, stage=MLLMStage2, strategy="fsdp2", precision="bf16-mixed"),
}


ALL = [f"ddp: {name}" for name in DDP] + [f"fsdp2: {name}" for name in FSDP2]
FEW = ["ddp: dualvitok in two micro-batches", "ddp: vision encoder", "ddp: decoder", "ddp: stage 3"]
"""Enough on three devices, as starting them takes longest; the others are for slow tests."""


def alone(world: Path, out: Path) -> dict[str, Result]:
    """What one device makes of them; leaves a checkpoint of half of the last one."""
    found = {f"ddp: {name}": run(world, 1) for name, run in DDP.items()}
    found |= {f"fsdp2: {name}": found[f"ddp: {name}"] for name in FSDP2 if name != "bf16"}
    found["fsdp2: bf16"] = mllm(world, 1, MLLMStage2, precision="bf16-mixed")
    found["resumed"] = resumable(world, 1, callbacks=(SaveAt(out / "file1.ckpt"),))
    return found


def several(world: Path, devices: int, out: Path, names: list[str]) -> dict[str, Result]:
    """Those named; with two devices, checkpoints of both kinds, which three go on from."""
    runs = {"ddp": DDP, "fsdp2": FSDP2}
    parts = [name.split(": ") for name in names]
    found = {f"{strategy}: {name}": runs[strategy][name](world, devices) for strategy, name in parts}
    path = out / f"file{devices - 1}.ckpt"
    found["resumed from a file"] = resumable(world, devices, strategy="fsdp2", ckpt_path=str(path))
    if devices == 2:
        for kind, strategy in (("file2", "fsdp2"), ("folder2", "fsdp2_sharded")):
            save = SaveAt(out / f"{kind}.ckpt", stop=True)
            resumable(world, 2, strategy=strategy, callbacks=(save,))
    else:
        path = out / f"folder{devices - 1}.ckpt"
        found["resumed from a folder"] = resumable(world, devices, strategy="fsdp2", ckpt_path=str(path))
    return found


if __name__ == "__main__":
    devices, world, out = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    results = several(world, devices, out, sys.argv[4:])
    rank = torch.distributed.get_rank()
    torch.save(results, out / f"results{devices}-{rank}.pt")
