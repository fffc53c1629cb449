"""Loss and gradients are those of all logits in fp64, and the logits of all tokens are never there."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from illume_lightning.nn import linear_cross_entropy as module
from illume_lightning.nn.linear_cross_entropy import CrossEntropy, linear_cross_entropy

N, D, SIZES = 75, 16, (130, 90)
IDS = sum(SIZES)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles per table, the last of each short."""
    monkeypatch.setattr(module, "_CPU_TILE_ROWS", 50)


def world(dtype: torch.dtype = torch.float32, num_tokens: int = N) -> tuple[Tensor, list[Tensor], Tensor]:
    """Hidden states, two tables, and targets in both of them of which every fifth is ignored."""
    torch.manual_seed(0)
    hidden = torch.randn(num_tokens, D, dtype=dtype)
    tables = [torch.randn(size, D, dtype=dtype).requires_grad_() for size in SIZES]
    targets = torch.randint(IDS, (num_tokens,))
    # Some are the likeliest id of their token.
    targets[:20] = (hidden @ torch.cat(tables).t()).argmax(1)[:20]
    targets[::5] = -100
    return hidden.requires_grad_(), tables, targets


def dense(
    hidden: Tensor, tables: list[Tensor], targets: Tensor, weights: Tensor | None = None, z_loss: float = 0.0
) -> tuple[CrossEntropy, list[Tensor]]:
    """Everything from all logits at once in fp64, and the gradients of hidden and tables."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in (hidden, *tables)]
    logits = leaves[0] @ torch.cat(leaves[1:]).t()
    losses = F.cross_entropy(logits, targets, reduction="none")
    counts = targets != -100
    weights = counts.double() / counts.sum() if weights is None else weights.double() * counts
    loss = (weights * (losses + z_loss * logits.logsumexp(1).square())).sum()
    gradients = list(torch.autograd.grad(loss, leaves))
    return CrossEntropy(loss, losses, (logits.argmax(1) == targets) & counts), gradients


def check(
    result: CrossEntropy, hidden: Tensor, tables: list[Tensor], *, targets: Tensor, **options: Any
) -> None:
    """Values and, after backward, gradients are the dense ones to a few roundings of fp32."""
    expected, gradients = dense(hidden, tables, targets, **options)
    assert result.loss.dtype == result.token_losses.dtype == torch.float32
    torch.testing.assert_close(result.loss.double(), expected.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(result.token_losses.double(), expected.token_losses, rtol=1e-5, atol=1e-6)
    assert torch.equal(result.is_correct, expected.is_correct)
    for tensor, gradient in zip((hidden, *tables), gradients, strict=True):
        scale = gradient.abs().max().item()
        torch.testing.assert_close(tensor.grad.double(), gradient, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("chunk_size", [1, 7, 37, N - 1, N, 1000, None])
def test_equals_all_logits_in_fp64(chunk_size: int | None) -> None:
    hidden, tables, targets = world()
    result = linear_cross_entropy(hidden, tables, targets, chunk_size=chunk_size)
    assert 5 < result.is_correct.sum() < 30
    result.loss.backward()
    check(result, hidden, tables, targets=targets)


@pytest.mark.parametrize("z_loss", [0.0, 1e-4, 0.3])
def test_weights_and_z_loss(z_loss: float) -> None:
    hidden, tables, targets = world()
    weights = torch.rand(N) * (torch.arange(N) % 3 > 0)
    result = linear_cross_entropy(hidden, tables, targets, weights, z_loss=z_loss, chunk_size=32)
    result.loss.backward()
    check(result, hidden, tables, targets=targets, weights=weights, z_loss=z_loss)
    unseen = (weights == 0) | (targets == -100)
    assert not hidden.grad[unseen].any()
    assert hidden.grad[~unseen].any(1).all()


def test_matches_torch() -> None:
    hidden, tables, targets = world()
    result = linear_cross_entropy(hidden, tables, targets, chunk_size=32)
    torch.testing.assert_close(result.loss, F.linear_cross_entropy(hidden, torch.cat(tables), targets))


def test_gradcheck() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(size, 3, dtype=torch.float64, requires_grad=True) for size in (7, 4, 5)]
    targets = torch.tensor([0, 8, -100, 3, 4, 8, 1])
    weights = torch.rand(7, dtype=torch.float64)

    def loss(*tensors: Tensor) -> Tensor:
        result = linear_cross_entropy(tensors[0], tensors[1:], targets, weights, z_loss=0.1, chunk_size=3)
        assert result.loss.dtype == torch.float64
        return result.loss

    class Fresh(torch.autograd.Function):
        """The loss with a graph of its own per backward: gradcheck walks one graph several times."""

        @staticmethod
        def forward(ctx: Any, *tensors: Tensor) -> Tensor:
            ctx.save_for_backward(*tensors)
            return loss(*tensors)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
            leaves = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
            with torch.enable_grad():
                return torch.autograd.grad(loss(*leaves), leaves, gradient)

    assert torch.autograd.gradcheck(Fresh.apply, inputs)


def test_two_tables_are_one_concatenated_table() -> None:
    hidden, tables, targets = world()
    joined = torch.cat(tables).detach().requires_grad_()
    apart = linear_cross_entropy(hidden, tables, targets, chunk_size=32)
    apart.loss.backward()
    gradient, hidden.grad = hidden.grad, None
    together = linear_cross_entropy(hidden, [joined], targets, chunk_size=32)
    together.loss.backward()
    torch.testing.assert_close(apart.loss, together.loss)
    torch.testing.assert_close(gradient, hidden.grad)
    torch.testing.assert_close(torch.cat([table.grad for table in tables]), joined.grad)


def test_a_scaled_loss_scales_its_gradients() -> None:
    plain, scaled = world(), world()
    linear_cross_entropy(*plain, chunk_size=32).loss.backward()
    (3 * linear_cross_entropy(*scaled, chunk_size=32).loss).backward()
    for one, three in zip((plain[0], *plain[1]), (scaled[0], *scaled[1]), strict=True):
        torch.testing.assert_close(three.grad, 3 * one.grad)


def test_gradients_come_once() -> None:
    loss = linear_cross_entropy(*world()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_only_the_loss_has_a_gradient() -> None:
    result = linear_cross_entropy(*world())
    assert [value.requires_grad for value in result] == [True, False, False]


@pytest.mark.parametrize("targets", [torch.full((N,), -100), torch.empty(0, dtype=torch.int64)])
def test_no_token_counts(targets: Tensor) -> None:
    hidden, tables, _ = world(num_tokens=len(targets))
    result = linear_cross_entropy(hidden, tables, targets, z_loss=0.1)
    result.loss.backward()
    assert result.loss == 0
    assert not result.token_losses.any() and not result.is_correct.any()
    for tensor in (hidden, *tables):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_an_ignored_id_of_the_tables() -> None:
    hidden, tables, targets = world()
    expected = linear_cross_entropy(hidden, tables, targets)
    ignored = targets[expected.is_correct][0].item()
    is_kept = (targets != ignored) & (targets >= 0)
    result = linear_cross_entropy(
        hidden, tables, targets.where(targets >= 0, ignored), torch.ones(N), ignore_index=ignored
    )
    assert torch.equal(result.token_losses, expected.token_losses * is_kept)
    assert torch.equal(result.is_correct, expected.is_correct & is_kept)
    torch.testing.assert_close(result.loss, result.token_losses.sum())


def test_large_logits() -> None:
    """Probabilities of 0 and 1, whose exponentials alone would overflow."""
    hidden, tables, targets = world()
    with torch.no_grad():
        hidden *= 200
    result = linear_cross_entropy(hidden, tables, targets, chunk_size=32)
    result.loss.backward()
    assert result.token_losses.max() > 1000
    expected, gradients = dense(hidden, tables, targets)
    torch.testing.assert_close(result.token_losses.double(), expected.token_losses, rtol=1e-5, atol=1e-3)
    for tensor, gradient in zip((hidden, *tables), gradients, strict=True):
        # An fp32 logit of 3000 is known to 1e-4, and so is its exponential.
        torch.testing.assert_close(tensor.grad.double(), gradient, rtol=1e-3, atol=1e-3)


BF16 = 2**-8  # Rounding step of bf16 relative to the number.


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_autocast", [True, False])
def test_half_precision(hidden_dtype: torch.dtype, table_dtype: torch.dtype, is_autocast: bool) -> None:
    """Close to fp64 of the same numbers: logits of up to 32 are known to an eighth."""
    hidden, tables, targets = world()
    hidden = hidden.detach().to(hidden_dtype).requires_grad_()
    tables = [table.detach().to(table_dtype).requires_grad_() for table in tables]
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        result = linear_cross_entropy(hidden, tables, targets, z_loss=1e-4, chunk_size=32)
    (2 * result.loss).backward()
    expected, gradients = dense(hidden, tables, targets, z_loss=1e-4)
    assert result.loss.dtype == torch.float32
    torch.testing.assert_close(result.loss.double(), expected.loss, rtol=2 * BF16, atol=0)
    torch.testing.assert_close(result.token_losses.double(), expected.token_losses, rtol=0, atol=32 * BF16)
    for tensor, gradient in zip((hidden, *tables), gradients, strict=True):
        assert tensor.grad.dtype == tensor.dtype
        error = (tensor.grad / 2 - gradient).norm() / gradient.norm()
        half = is_autocast or hidden_dtype == table_dtype == torch.bfloat16
        assert error < (4 * BF16 if half else BF16)
    if hidden_dtype == table_dtype == torch.bfloat16:
        assert result.loss != result.loss.bfloat16()


def test_autocast_is_not_felt_in_fp64() -> None:
    hidden, tables, targets = world(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        result = linear_cross_entropy(hidden, tables, targets)
    torch.testing.assert_close(result.loss, dense(hidden, tables, targets)[0].loss, rtol=1e-12, atol=0)


class Allocations(TorchDispatchMode):
    """The largest tensor that any operation returned, how often a product ran, and all memory seen."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.products = 0
        self.addresses: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.products += "_linear_pointwise" in str(function) or "mm" in str(function)
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.numel())
                self.addresses.add(value.untyped_storage().data_ptr())
        return result


def allocations(call: Callable[[], Any]) -> Allocations:
    with Allocations() as seen:
        call()
    return seen


def test_all_logits_are_never_there() -> None:
    hidden, tables, targets = world()
    all_logits = allocations(lambda: F.linear_cross_entropy(hidden, torch.cat(tables), targets).backward())
    assert all_logits.largest == N * IDS
    chunked = allocations(
        lambda: linear_cross_entropy(hidden, tables, targets, chunk_size=20).loss.backward()
    )
    assert chunked.largest == 20 * IDS


def test_a_table_gradient_is_summed_where_it_stays() -> None:
    hidden, tables, targets = world()
    result = []
    seen = allocations(lambda: result.append(linear_cross_entropy(hidden, tables, targets)))
    result[0].loss.backward()
    assert {table.grad.untyped_storage().data_ptr() for table in tables} <= seen.addresses


def test_without_gradients_only_tiles_of_logits_are_there() -> None:
    hidden, tables, targets = world()
    expected = linear_cross_entropy(hidden, tables, targets, chunk_size=20)
    with torch.no_grad():
        result = linear_cross_entropy(hidden, tables, targets, chunk_size=20)
        seen = allocations(lambda: linear_cross_entropy(hidden, tables, targets, chunk_size=20))
    assert not result.loss.requires_grad
    assert all(torch.equal(value, other) for value, other in zip(result, expected, strict=True))
    assert seen.largest <= max(20 * 50, IDS * D // 2)
    detached = [hidden.detach(), [table.detach() for table in tables], targets]
    frozen = allocations(lambda: linear_cross_entropy(*detached, chunk_size=20))
    assert (frozen.largest, frozen.products) == (seen.largest, seen.products)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_table_costs_nothing(frozen: int) -> None:
    hidden, tables, targets = world()
    full = allocations(lambda: linear_cross_entropy(hidden, tables, targets).loss.backward())
    gradients = [hidden.grad.clone(), tables[1 - frozen].grad.clone()]
    hidden.grad = tables[0].grad = tables[1].grad = None
    tables[frozen].requires_grad_(False)
    partly = allocations(lambda: linear_cross_entropy(hidden, tables, targets).loss.backward())
    assert tables[frozen].grad is None
    assert torch.equal(hidden.grad, gradients[0]) and torch.equal(tables[1 - frozen].grad, gradients[1])
    chunks, tiles = 2, -(-SIZES[frozen] // 50)
    assert full.products - partly.products == chunks * tiles


def test_frozen_hidden_states() -> None:
    hidden, tables, targets = world()
    linear_cross_entropy(hidden.detach(), tables, targets).loss.backward()
    expected = [table.grad.clone() for table in tables]
    tables[0].grad = tables[1].grad = None
    linear_cross_entropy(hidden, tables, targets).loss.backward()
    assert all(torch.equal(table.grad, other) for table, other in zip(tables, expected, strict=True))


@pytest.mark.parametrize(
    ("num_tokens", "num_ids", "expected"),
    [(2048, 284_000, 256), (10**5, 284_000, 256), (1024, 4000, 128), (10, 50, 64), (2048, 10**7, 64)],
)
def test_default_chunk_size(num_tokens: int, num_ids: int, expected: int) -> None:
    assert module._default_chunk_size(num_tokens, num_ids) == expected


def test_no_value_is_waited_for_on_a_device() -> None:
    """Fake tensors have shapes but no values: whatever needs one fails."""
    with FakeTensorMode():
        hidden = torch.empty(N, D, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        tables = [torch.empty(size, D, device="cuda", requires_grad=True) for size in SIZES]
        targets = torch.empty(N, dtype=torch.int64, device="cuda")
        result = linear_cross_entropy(hidden, tables, targets, z_loss=0.1, chunk_size=32)
        # Gradients too are there by now.
        with pytest.raises(RuntimeError, match="_local_scalar_dense"):
            result.loss.item()
    assert [(value.device.type, value.shape) for value in result] == [
        ("cuda", ()),
        ("cuda", (N,)),
        ("cuda", (N,)),
    ]


def test_views_and_uneven_memory() -> None:
    hidden, tables, targets = world()
    strided = [torch.stack([table.detach()] * 2, 2)[..., 0].requires_grad_() for table in tables]
    transposed = hidden.detach().t().contiguous().t().requires_grad_()
    result = linear_cross_entropy(transposed, strided, targets, chunk_size=32)
    result.loss.backward()
    check(result, transposed, strided, targets=targets)


def test_bad_input_is_named() -> None:
    hidden, tables, targets = world()
    with pytest.raises(ValueError, match=r"hidden \(75, 16\).*\(130, 16\), \(90, 15\)"):
        linear_cross_entropy(hidden, [tables[0], tables[1][:, 1:]], targets)
    with pytest.raises(ValueError, match="at least one row"):
        linear_cross_entropy(hidden, [], targets)
    with pytest.raises(ValueError, match=r"targets are \(74,\) torch.int64, expected \(75,\)"):
        linear_cross_entropy(hidden, tables, targets[1:])
    with pytest.raises(ValueError, match=r"torch.int32, expected \(75,\) int64"):
        linear_cross_entropy(hidden, tables, targets.int())
    with pytest.raises(ValueError, match=r"weights are \(3,\), expected \(75,\)"):
        linear_cross_entropy(hidden, tables, targets, torch.ones(3))
    with pytest.raises(ValueError, match="chunk_size is 0"):
        linear_cross_entropy(hidden, tables, targets, chunk_size=0)


@pytest.mark.parametrize("target", [IDS, -1])
def test_an_unknown_target_is_named(target: int) -> None:
    hidden, tables, targets = world()
    targets[4] = target
    with pytest.raises(ValueError, match=rf"target {target} is no id of tables with 220 rows"):
        linear_cross_entropy(hidden, tables, targets)


def test_an_unknown_target_elsewhere_has_an_infinite_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_check_targets", lambda *_: None)
    hidden, tables, targets = world()
    targets[4] = IDS
    result = linear_cross_entropy(hidden, tables, targets)
    assert result.token_losses.isinf().nonzero().tolist() == [[4]]
    assert result.loss.isinf() and not result.is_correct[4]
