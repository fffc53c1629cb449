"""A step without values costs what the same step costs with values."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from budget.models import BUILDERS, DATA, checkpointed_mllm, dualvitok, mllm, phase_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from illume_lightning.budget.dry_step import (
    CPU_FORMULAS,
    FP32_UNDER_AUTOCAST,
    PRECISIONS,
    Recorder,
    StepCost,
    dry_step,
    tensor_bytes,
)
from illume_lightning.budget.memory import plan_memory
from illume_lightning.budget.run_model import configure
from illume_lightning.budget.sample_batch import sample_batch
from illume_lightning.lit.training import TrainingModule

FP32 = PRECISIONS["32-true"]


def planned(
    build: Callable[[], TrainingModule], precision: str = "32-true", **options: Any
) -> tuple[TrainingModule, StepCost]:
    """A module without values, and its step."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        module = build()
    configure(module, fake)
    batch = sample_batch(module, phase_of(module), DATA, fake)
    options = {"is_accelerator": False} | options
    return module, dry_step(module, batch, 1, PRECISIONS[precision], Recorder(fake), **options)


class Saved:
    """Bytes that autograd keeps, apart from a module's own tensors."""

    def __init__(self, module: TrainingModule) -> None:
        networks = (module, *module.fixed.values())
        self._known = {
            t.untyped_storage().data_ptr() for n in networks for t in (*n.parameters(), *n.buffers())
        }
        self.storages: dict[int, int] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor


def allocated_peak(profile: Any) -> int:
    """Most bytes at a time that a profile's own allocations make up."""
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("build", BUILDERS)
def test_memory_is_that_of_a_real_step(build: Callable[[], TrainingModule]) -> None:
    module, cost = planned(build)
    options = {"averages": False, "accumulates": False, "is_accelerator": False}
    memory = plan_memory(module, cost, 1, "ddp", FP32, **options)

    torch.manual_seed(0)
    module = build()
    module.configure_model()
    optimizers: Any = module.configure_optimizers()
    batch = sample_batch(module, phase_of(module), DATA, None)
    saved = Saved(module)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    for optimizer in optimizers[0]:
        optimizer.step()  # makes the moments
        optimizer.zero_grad()
    states = [t for o in optimizers[0] for s in o.state.values() for t in s.values() if torch.is_tensor(t)]
    there = sum(tensor_bytes(network) for network in (module, *module.fixed.values()))
    there += sum(state.nbytes for state in states)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        torch.profiler.profile(activities=activities, profile_memory=True) as profile,
        torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor),
    ):
        dry_step(module, batch, 1, FP32, Recorder(), is_accelerator=False)
    assert memory.peak == pytest.approx(there + allocated_peak(profile), rel=0.05)
    assert memory.optimizer == pytest.approx(sum(state.nbytes for state in states), rel=0.01)
    if build is not checkpointed_mllm:  # recomputing hides from hooks what is saved
        assert memory.activations == pytest.approx(sum(saved.storages.values()), rel=0.05)


@pytest.mark.parametrize("build", BUILDERS)
def test_products_are_those_of_a_real_step(build: Callable[[], TrainingModule]) -> None:
    _, cost = planned(build)
    torch.manual_seed(0)
    module = build()
    module.configure_model()
    batch = sample_batch(module, phase_of(module), DATA, None)
    with FlopCounterMode(display=False, custom_mapping=CPU_FORMULAS) as counter:
        dry_step(module, batch, 1, FP32, Recorder(), is_accelerator=False)
    assert cost.flops == counter.get_total_flops() > 0


def test_recomputed_activations_cost_products_and_save_memory() -> None:
    plain, checkpointed = planned(mllm)[1], planned(checkpointed_mllm)[1]
    assert checkpointed.flops > plain.flops
    assert checkpointed.kept < plain.kept


def test_autocast_keeps_less_and_on_accelerators_norms_in_fp32() -> None:
    full, on_cpu = planned(dualvitok)[1], planned(dualvitok, "bf16-mixed")[1]
    accelerated = planned(dualvitok, "bf16-mixed", is_accelerator=True)[1]
    assert on_cpu.kept < accelerated.kept < full.kept * 1.2
    assert on_cpu.flops == accelerated.flops == full.flops


def test_accelerators_do_cast_these_to_fp32() -> None:
    """torch's own table for CUDA has them; four are made of others that it has."""
    composite = {"normalize", "norm", "vector_norm", "interpolate"}
    for name in FP32_UNDER_AUTOCAST - composite:
        schemas = torch._C._jit_get_schemas_for_operator(f"aten::{name}")
        kernels = [f"{s.name}.{s.overload_name}".rstrip(".") for s in schemas]
        assert any(torch._C._dispatch_has_kernel_for_dispatch_key(k, "AutocastCUDA") for k in kernels), name


def test_gradients_of_an_earlier_micro_batch_are_not_counted_twice() -> None:
    fresh, later = planned(mllm)[1], planned(mllm, accumulates=True)[1]
    assert later.kept == fresh.kept
    assert later.peak <= fresh.peak


def test_sharded_gradients_leave_the_device() -> None:
    module, cost = planned(mllm, shards=True)
    assert all(parameter.grad is None for parameter in module.parameters())
    assert cost.peak <= planned(mllm)[1].peak


def test_a_module_is_left_as_it_was() -> None:
    module, _ = planned(mllm)
    assert not {"log", "manual_backward", "step_optimizers"} & set(vars(module))
    assert all(parameter.grad is None for parameter in module.parameters())
    assert torch.get_default_dtype() == torch.float32
