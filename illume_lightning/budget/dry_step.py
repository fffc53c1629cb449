"""A training step on tensors that have shapes and no values: its products counted, its live memory measured.

The tensors say that they are on the CPU, the one device that every installation of torch can differentiate on, and
that has autocast; what accelerators do differently under autocast is added.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

from illume_lightning.lit.training import TrainingModule
from illume_lightning.nn import linear_cross_entropy

aten = torch.ops.aten


_Shape = Sequence[int]


def _attention(query: _Shape, key: _Shape, value: _Shape, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    gradient: _Shape, query: _Shape, key: _Shape, value: _Shape, *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


def _linear(x: _Shape, weight: _Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(x) * weight[0]


CPU_FORMULAS: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.mkldnn._linear_pointwise: _linear,
}
"""Operations of each of the CPU's own kernels, which torch's counter leaves out; as its ``custom_mapping``."""

_FORMULAS = {**flop_registry, **{kernel: shape_wrapper(formula) for kernel, formula in CPU_FORMULAS.items()}}

FP32_UNDER_AUTOCAST = frozenset(
    (
        *("binary_cross_entropy_with_logits", "l1_loss", "mse_loss", "cosine_similarity"),
        *("group_norm", "layer_norm", "norm", "normalize", "vector_norm"),
        *("exp", "log", "pow", "reciprocal", "rsqrt", "softplus", "softmax", "log_softmax"),
        *("cumsum", "sum", "interpolate"),
    )
)
"""What accelerators compute in fp32 under autocast and CPUs do not (torch.amp's "CUDA Ops that can autocast to
float32", as far as the models here have them); torch_npu's list is the same."""


@dataclass(frozen=True)
class Precision:
    """One of Lightning's precisions."""

    weights: torch.dtype
    """Type of weights, gradients and moments."""

    autocast: torch.dtype | None
    """Type of products where it is another one."""


PRECISIONS = {
    "32-true": Precision(torch.float32, None),
    "bf16-mixed": Precision(torch.float32, torch.bfloat16),
    "16-mixed": Precision(torch.float32, torch.float16),
    "bf16-true": Precision(torch.bfloat16, None),
    "16-true": Precision(torch.float16, None),
}


@dataclass(frozen=True)
class StepCost:
    """A micro-batch's forward and backward pass on one device."""

    flops: int
    """Operations of matrix products, convolutions and attention; what is computed again counts again."""

    kept: int
    """Bytes that the forward pass leaves for the backward pass."""

    peak: int
    """Largest number of bytes beside those that were there before the step."""


class Recorder(TorchDispatchMode):
    """Counts products, and the bytes of all tensors that are alive.

    Args:
        fake: what makes tensors without values; none where all have some.
    """

    def __init__(self, fake: FakeTensorMode | None = None) -> None:
        super().__init__()
        self._fake = fake
        self._storages: dict[int, weakref.ref] = {}
        self.flops = self.live = self.peak = 0

    def ignore(self, tensor: Tensor) -> None:
        """Leave the memory of a tensor out."""
        storage = tensor.untyped_storage()
        self._storages[storage._cdata] = weakref.ref(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        if func is torch.ops.prim.device.default:  # more than half of all calls
            return args[0].device
        kwargs = kwargs or {}
        out = self._run(func, args, kwargs)
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        tree_map_only(Tensor, self.count, out)
        return out

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if self._fake is None:
            return func(*args, **kwargs)
        if func is aten.nonzero.default and isinstance(args[0], FakeTensor):
            # In the search for the nearest code: one block of codes for each token, as for nearly all of them.
            with self._fake:
                return torch.empty(args[0].shape[-1], args[0].ndim, dtype=torch.long)
        if _makes_tensors(func):
            with self._fake:
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def count(self, tensor: Tensor) -> None:
        """Count a tensor's memory until it is freed; once, however many tensors share it."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        self._storages[key] = weakref.ref(storage, partial(self._freed, key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _freed(self, key: int, size: int, _: Any) -> None:
        del self._storages[key]
        self.live -= size


@cache
def _makes_tensors(func: Any) -> bool:
    """Whether an operation takes no tensor."""
    return not any("Tensor" in str(argument.type) for argument in func._schema.arguments)


class _AcceleratorCasts(TorchFunctionMode):
    """Autocast's fp32 operations of accelerators, where autocast is on."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "").strip("_")
        if name in FP32_UNDER_AUTOCAST and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(_widened, (tuple(args), kwargs or {}))
        return func(*args, **(kwargs or {}))


def _widened(value: Any) -> Any:
    is_half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if is_half else value


def dry_step(
    module: TrainingModule,
    batch: Any,
    step: int,
    precision: Precision,
    recorder: Recorder,
    *,
    accumulates: bool = False,
    shards: bool = False,
    is_accelerator: bool = True,
) -> StepCost:
    """Run a module's ``training_step`` up to its optimizers.

    Args:
        module: with tensors of the recorder's kind.
        batch: a micro-batch.
        step: training step, which decides what is on.
        precision: of the run.
        recorder: that has counted nothing yet.
        accumulates: the gradients of an earlier micro-batch are there already.
        shards: gradients leave the device as they come (FSDP2).
        is_accelerator: autocast as on an accelerator.
    """
    kept: list[int] = []

    def backward(loss: Tensor) -> None:
        kept.append(recorder.live)
        loss.backward()

    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in trainable if shards]
    if accumulates and not shards:
        for parameter in trainable:
            parameter.grad = torch.zeros_like(parameter)
            recorder.ignore(parameter.grad)
    with ExitStack() as stack:
        if shards and precision.autocast is not None:
            stack.enter_context(_cast(blocks(module), precision.autocast))
        for network in (module, *module.fixed.values()):
            for tensor in (*network.parameters(), *network.buffers()):
                recorder.ignore(tensor)
        tree_map_only(Tensor, recorder.count, batch)
        stack.enter_context(_attached(module, step, backward))
        stack.enter_context(_computing(precision, is_accelerator))
        stack.enter_context(recorder)
        module.training_step(batch, 0)
    for hook in hooks:
        hook.remove()
    module.zero_grad()
    return StepCost(recorder.flops, max(kept), recorder.peak)


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """What FSDP2 gathers one by one: the members of the outermost lists of modules."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from blocks(child)


@contextmanager
def _cast(networks: Iterable[nn.Module], dtype: torch.dtype) -> Iterator[None]:
    """Weights in another type for a while."""
    weights = [(p, p.data) for network in networks for p in network.parameters()]
    for parameter, value in weights:
        parameter.data = value.to(dtype)
    try:
        yield
    finally:
        for parameter, value in weights:
            parameter.data = value


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


@contextmanager
def _attached(module: Any, step: int, backward: Callable[[Tensor], None]) -> Iterator[None]:
    """A module without trainer: nothing is logged or checked, and no optimizer steps."""
    module.trainer = SimpleNamespace(
        global_step=step,
        log_every_n_steps=step + 2,
        distributed_sampler_kwargs=None,
        world_size=1,
        strategy=SingleDeviceStrategy(torch.device("cpu")),
    )
    replaced: dict[str, Any] = dict.fromkeys(
        # Without draws of their own, samples share the device's generator: these tensors hold no numbers.
        ("log", "require_finite", "step_optimizers", "step_schedules", "draws"),
        _nothing,
    )
    replaced |= {"manual_backward": backward, "all_optimizers": list}
    vars(module).update(replaced)
    try:
        yield
    finally:
        for name in replaced:
            del vars(module)[name]
        module.trainer = None


def _nothing(*_: Any, **__: Any) -> None:
    pass


@contextmanager
def _computing(precision: Precision, is_accelerator: bool) -> Iterator[None]:
    with ExitStack() as stack:
        if precision.autocast is not None:
            stack.enter_context(torch.autocast("cpu", precision.autocast))
            if is_accelerator:
                stack.enter_context(_AcceleratorCasts())
        if is_accelerator:
            stack.callback(
                setattr, linear_cross_entropy, "_CPU_TILE_ROWS", linear_cross_entropy._CPU_TILE_ROWS
            )
            linear_cross_entropy._CPU_TILE_ROWS = linear_cross_entropy._TILE_ROWS
        stack.enter_context(default_type(precision.weights))
        yield


@contextmanager
def default_type(dtype: torch.dtype) -> Iterator[None]:
    """New tensors have this type, as Lightning has it with weights in half precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def tensor_bytes(network: nn.Module) -> int:
    """Of a network's parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
