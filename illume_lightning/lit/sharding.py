"""Weights, gradients and optimizer state shared out over devices: FSDP2, by Lightning's ModelParallelStrategy."""

import shutil
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.optim import Optimizer

from illume_lightning.nn.checkpoints import check_state_dict
from illume_lightning.nn.plain_file import load_plain
from illume_lightning.nn.sharded_checkpoint import hollow_weights, is_sharded


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy with every device in its data-parallel dimension; ``strategy: fsdp2``.

    A checkpoint is one file, as any strategy's, and read by any; or, for models that no host can hold, a folder with
    a file of each device (``strategy: fsdp2_sharded``), which FSDP2 reads on any number of devices, and
    ``nn.sharded_checkpoint.consolidate`` makes one file of. A folder appears whole, or not at all.

    Args:
        save_distributed_checkpoint: write folders.
        options: of ModelParallelStrategy.
    """

    strategy_name = "fsdp2"

    def __init__(self, save_distributed_checkpoint: bool = False, **options: Any) -> None:
        super().__init__(save_distributed_checkpoint=save_distributed_checkpoint, **options)

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Make it known, with checkpoints of one file and of a folder."""
        for suffix, kind, is_folder in (("", "files", False), ("_sharded", "folders", True)):
            strategy_registry.register(
                cls.strategy_name + suffix,
                cls,
                description=f"FSDP2; checkpoints are {kind}",
                override=True,
                save_distributed_checkpoint=is_folder,
            )

    def setup_environment(self) -> None:
        """Start the processes' group, with a mesh of one dimension that shares out the batch."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def teardown(self) -> None:
        """Also wait for checkpoints that are still being written, which Lightning's leaves out."""
        super().teardown()
        self.checkpoint_io.teardown()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Write a file, or a folder beside its place, which then takes it."""
        path = Path(self.broadcast(filepath))
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        partial = path.with_name(path.name + ".partial")
        if self.is_global_zero:
            shutil.rmtree(partial, ignore_errors=True)
        self.barrier()
        super().save_checkpoint(checkpoint, partial, storage_options)
        self.barrier()
        if self.is_global_zero:
            _replace(path, partial)
        self.barrier()

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a file of any strategy, or a folder of any number of devices.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is of another model; names the first weights that differ.
        """
        path = Path(self.broadcast(checkpoint_path))
        assert self.model is not None and self.lightning_module is not None
        own = self.lightning_module.state_dict()
        if is_sharded(path):
            check_state_dict(own, hollow_weights(path), str(path))
            return super().load_checkpoint(path, weights_only=True)
        if not path.is_file():
            raise FileNotFoundError(f"no checkpoint at {path}: expected a file, or a whole folder of FSDP2")
        checkpoint = load_plain(path)
        weights = checkpoint.pop("state_dict")
        check_state_dict(own, weights, str(path))
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.model, weights, options=options)
        if self.optimizers:
            for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
                # Lightning's own reading takes numbers for places in the model, where they are places in the groups.
                named = _named(state, optimizer, self.lightning_module)
                set_optimizer_state_dict(self.model, optimizer, named, options=options)
        return checkpoint


FSDP2Strategy.register_strategies(StrategyRegistry)


def shard(module: L.LightningModule, root: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """Share a model out over the devices, where the strategy is FSDP2; else, or if it is done, nothing.

    Each block's weights are gathered while it runs, those outside of blocks from the start of ``root.forward`` until
    the gradients are there. So ``root.forward`` is the way in, and every device has to run each block equally often.
    With ``bf16-mixed`` the weights of blocks travel, and their gradients are computed, in bfloat16, as autocast
    would turn them; gradients are summed in fp32.

    Args:
        module: whose strategy it is.
        root: the model; frozen and trained weights may be mixed in any way.
        blocks: parts of it.

    Raises:
        ValueError: if the strategy has a tensor-parallel dimension.
    """
    mesh = module.device_mesh
    if mesh is None or isinstance(root, FSDPModule):
        return
    if mesh["tensor_parallel"].size() > 1:
        raise ValueError(
            f"{type(module).__name__} has no tensor parallelism: use strategy fsdp2, or give ModelParallelStrategy "
            f"data_parallel_size {mesh.size()} and tensor_parallel_size 1"
        )
    is_mixed = module.trainer.precision == "bf16-mixed"
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if is_mixed:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh["data_parallel"], mp_policy=policy)
    fully_shard(root, mesh=mesh["data_parallel"], mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))


def _named(state: Mapping[str, Any], optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """An optimizer's state with names of parameters for its own keys, whatever they are."""
    name_of = {id(parameter): name for name, parameter in module.named_parameters()}
    own = [[name_of[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    keys = chain.from_iterable(group["params"] for group in state["param_groups"])
    names = dict(zip(keys, chain.from_iterable(own), strict=True))
    groups = [{**group, "params": params} for group, params in zip(state["param_groups"], own, strict=True)]
    return {"state": {names[key]: values for key, values in state["state"].items()}, "param_groups": groups}


def _replace(path: Path, partial: Path) -> None:
    """Let a folder take another's place."""
    old = path.with_name(path.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if path.is_dir():
        path.rename(old)
    elif path.exists():
        path.unlink()
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)
