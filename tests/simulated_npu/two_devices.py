"""Parts that two processes train on an NPU each, started as a program by on_device.py, which trains them alone."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import test_dualvitok_module as dualvitok
import test_mllm_stages as mllm
import torch
from test_mllm_stages import MLLMStage3
from tiny_trainer import trainer_for

from illume_lightning.data.plan import Phase
from illume_lightning.lit import npu_strategies  # noqa: F401  # makes them known
from illume_lightning.lit.datamodule import ImageDataModule, Source


class Result(L.Callback):
    """Weights at the end, the device they were on, and a mean over devices of their numbers."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.device = str(next(pl_module.parameters()).device)
        pl_module.log("rank", float(trainer.global_rank), sync_dist=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        state = trainer.strategy.lightning_module_state_dict()
        self.weights = {key: value.detach().cpu().clone() for key, value in state.items()}
        self.mean_rank = float(trainer.callback_metrics["rank"])


def fit(where: dict[str, Any], phases: list[Phase], module: L.LightningModule, data: Any) -> dict[str, Any]:
    result = Result()
    trainer = trainer_for(None, phases, result, limit_val_batches=0, deterministic=False, **where)
    trainer.fit(module, data)
    return {"weights": result.weights, "device": result.device, "mean_rank": result.mean_rank}


def train_mllm(where: dict[str, Any], world: Path, shapes: Path) -> dict[str, Any]:
    """Plain steps, as Adam makes large ones of rounding errors."""
    module = mllm.build(
        world,
        MLLMStage3,
        vit_from_layer=0,
        gradient_clip=0.0,
        optimizer=lambda groups: torch.optim.SGD(groups),
    )
    return fit(
        where, mllm.phases(2, batch=8, micro=2), module, mllm.data(world, *mllm.TASKS, condition_dropout=0.0)
    )


def train_dualvitok(where: dict[str, Any], world: Path, shapes: Path) -> dict[str, Any]:
    module = dualvitok.build(
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01),
        discriminator_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01),
    )
    module.model.noise = None
    data = ImageDataModule([Source(str(shapes / "train"))], val_sizes=[], num_workers=0)
    # One micro-batch: the discriminator's batch norm counts over all devices.
    return fit(where, [Phase(2, "fixed", 64, 4, 4 // where["devices"])], module, data)


PARTS: dict[str, tuple[str, Callable[..., dict[str, Any]]]] = {
    "mllm": ("npu_ddp", train_mllm),
    "dualvitok": ("npu_ddp", train_dualvitok),
    "mllm_sharded": ("npu_fsdp2", train_mllm),
}
"""Strategy and training of each."""

if __name__ == "__main__":
    world, shapes, output = map(Path, sys.argv[1:])
    for name, (strategy, train) in PARTS.items():
        where = {"accelerator": "npu", "devices": 2, "strategy": strategy}
        result = train(where, world, shapes)
        torch.save(result, output / f"{name}{torch.distributed.get_rank()}")
