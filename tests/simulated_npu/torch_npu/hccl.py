"""The backend `hccl` of torch.distributed: the devices' memory, sent by gloo.

Of reductions it refuses AVG, which HCCL lacks.
"""

from typing import Any

import torch
import torch.distributed as dist


class HCCL(dist.ProcessGroup):
    """Every collective of gloo, on aliases of the tensors in the CPU's memory."""

    def __init__(self, store: Any, rank: int, size: int, timeout: Any) -> None:
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(dist.PrefixStore("hccl", store), rank, size, timeout)

    def getBackendName(self) -> str:
        return "hccl"

    @property
    def group_name(self) -> str:
        return self._name

    def getGroupName(self) -> str:
        return self._name

    def _set_group_name(self, name: str) -> None:
        self._name = name

    setGroupName = _set_group_name

    def _get_backend(self, device: torch.device) -> Any:
        return self._gloo

    def allreduce(self, tensors: Any, opts: Any = None) -> Any:
        opts = opts or dist.AllreduceOptions()
        return self._gloo.allreduce(_aliases(tensors), _checked(opts))

    def allreduce_coalesced(self, tensors: Any, opts: Any = None) -> Any:
        return self._gloo.allreduce_coalesced(_aliases(tensors), _checked(opts))

    def broadcast(self, tensors: Any, opts: Any = None) -> Any:
        return self._gloo.broadcast(_aliases(tensors), opts or dist.BroadcastOptions())

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        opts = opts or dist.AllgatherOptions()
        return self._gloo.allgather(_aliases(outputs), _aliases(inputs), opts)

    def _allgather_base(self, output: Any, input: Any, opts: Any = None) -> Any:
        opts = opts or dist.AllgatherOptions()
        return self._gloo._allgather_base(_aliases(output), _aliases(input), opts)

    all_gather_single = _allgather_base

    def allgather_into_tensor_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        opts = opts or dist.AllgatherOptions()
        return self._gloo.all_gather_single_coalesced(_aliases(outputs), _aliases(inputs), opts)

    def _reduce_scatter_base(self, output: Any, input: Any, opts: Any = None) -> Any:
        opts = _checked(opts or dist.ReduceScatterOptions())
        return self._gloo._reduce_scatter_base(_aliases(output), _aliases(input), opts)

    reduce_scatter_single = _reduce_scatter_base

    def reduce_scatter_tensor_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        opts = _checked(opts or dist.ReduceScatterOptions())
        return self._gloo.reduce_scatter_single_coalesced(_aliases(outputs), _aliases(inputs), opts)

    def scatter(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        return self._gloo.scatter(_aliases(outputs), _aliases(inputs), opts or dist.ScatterOptions())

    def gather(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        return self._gloo.gather(_aliases(outputs), _aliases(inputs), opts or dist.GatherOptions())

    def barrier(self, opts: Any = None) -> Any:
        return self._gloo.barrier(dist.BarrierOptions())


def register() -> None:
    """Make it the backend of `npu`, as torch_npu does."""
    dist.Backend.register_backend("hccl", HCCL, devices=["npu"])


def _aliases(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_aliases(item) for item in value]
    return torch.ops.simulated_npu.alias_on_cpu(value) if value.device.type == "npu" else value


def _checked(opts: Any) -> Any:
    if opts.reduceOp == dist.ReduceOp.AVG:
        raise RuntimeError("hccl has no ReduceOp.AVG")
    return opts
