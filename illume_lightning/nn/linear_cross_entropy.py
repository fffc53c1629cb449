"""Cross entropy of a linear head, without ever holding the logits of all tokens.

The head is a list of tables (text and vision), each a parameter of its own: ids count through them in order.

Shapes: N tokens, n tokens of a chunk, D width, V ids of all tables, v rows of a tile.
"""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from illume_lightning.nn.matmul import product

# Logits held at a time, 256 MiB of fp32: few enough to fit anywhere, enough to keep the products busy.
_CHUNK_LOGITS = 2**26
# Rows of a table per product: a tile that stays in the cache on the CPU, one that fills the device elsewhere.
_CPU_TILE_ROWS = 2048
_TILE_ROWS = 32768


class CrossEntropy(NamedTuple):
    """What ``linear_cross_entropy`` returns; fp32, or fp64 where all it was given is fp64."""

    loss: Tensor
    """Scalar, with gradient: sum over tokens of weight * (cross entropy + z_loss * logsumexp ** 2)."""
    token_losses: Tensor
    """(N,) plain cross entropy in nats, without gradient; 0 where ignored."""
    is_correct: Tensor
    """(N,) bool: whether no id has a larger logit than the target; False where ignored."""


def linear_cross_entropy(
    hidden: Tensor,
    tables: Sequence[Tensor],
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    chunk_size: int | None = None,
) -> CrossEntropy:
    """Cross entropy of the logits ``hidden @ cat(tables).T``, a chunk of tokens at a time.

    The forward pass also computes the gradients, while a chunk's logits are there; ``backward`` only scales
    them, in place, and so can run once. With gradients off, or where nothing needs one, only tiles of logits
    are held. No gradient is computed or stored for a tensor that does not require one, as for a frozen table.

    Matrix products are in the autocast type where autocast is on, else in the widest type of ``hidden`` and
    ``tables``; a table of another type is copied once. Log-sum-exp, losses and the sums of gradients are in
    fp32 (fp64 for fp64), and gradients come in the types of their tensors. fp16 is not advised: the products
    of a gradient come before any loss scaling, and underflow. The device is never waited for.

    Args:
        hidden: (N, D), any floating type.
        tables: (V_1, D), (V_2, D), ... of any floating types.
        targets: (N,) int64, in [0, V) or ``ignore_index``. Other ids are errors on the CPU; elsewhere the
            check would stall the device, and such a token gets an infinite loss instead.
        weights: (N,) weight of each token in the sum, a constant to the gradient; by default all tokens that
            are not ignored weigh the same and their weights sum to 1 (mean).
        ignore_index: target of tokens that don't count, whatever their weight.
        z_loss: weight of logsumexp ** 2, which keeps the logits from drifting (PaLM: 1e-4).
        chunk_size: tokens per chunk, which then holds chunk_size * V logits. By default an eighth of the
            tokens, or as many as have 256 MiB of fp32 logits where that is less, but at least 64, rounded up
            to a multiple of 32: small against all logits, large against rereading the tables every chunk.

    Raises:
        ValueError: where shapes or types don't fit, chunk_size < 1, or (on the CPU) a target is out of range.
    """
    _check_shapes(hidden, tables, targets, weights)
    num_ids = sum(len(table) for table in tables)
    is_counted = targets != ignore_index
    if targets.device.type == "cpu":
        _check_targets(targets[is_counted], num_ids, ignore_index)
    if chunk_size is None:
        chunk_size = _default_chunk_size(len(hidden), num_ids)
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}: a chunk needs at least 1 token.")
    dtype = _product_dtype(hidden, tables)
    counted = is_counted.to(_sum_dtype(dtype))
    weights = counted / counted.sum().clamp_min(1) if weights is None else weights.detach().to(counted.dtype)
    weights = weights.where(is_counted, 0)
    settings = _Settings(dtype, chunk_size, z_loss, torch.is_grad_enabled())
    return CrossEntropy(*_LinearCrossEntropy.apply(settings, hidden, targets, is_counted, weights, *tables))


def _check_shapes(hidden: Tensor, tables: Sequence[Tensor], targets: Tensor, weights: Tensor | None) -> None:
    shapes = [tuple(table.shape) for table in tables]
    is_fit = hidden.ndim == 2 and all(len(shape) == 2 and shape[1] == hidden.shape[1] for shape in shapes)
    if not is_fit or not any(shape[0] for shape in shapes):
        raise ValueError(
            f"hidden {tuple(hidden.shape)} has no logits with tables {shapes}: expected (N, D) and (V, D) "
            "with the same D, and at least one row."
        )
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets are {tuple(targets.shape)} {targets.dtype}, expected ({len(hidden)},) int64: one id per "
            "row of hidden."
        )
    if weights is not None and weights.shape != targets.shape:
        raise ValueError(f"weights are {tuple(weights.shape)}, expected {tuple(targets.shape)} as targets.")


def _check_targets(targets: Tensor, num_ids: int, ignore_index: int) -> None:
    wrong = targets[(targets < 0) | (targets >= num_ids)]
    if len(wrong):
        raise ValueError(
            f"target {int(wrong[0])} is no id of tables with {num_ids} rows in all: expected [0, {num_ids}) "
            f"or {ignore_index} for tokens that don't count."
        )


def _default_chunk_size(num_tokens: int, num_ids: int) -> int:
    size = max(64, min(math.ceil(num_tokens / 8), _CHUNK_LOGITS // max(1, num_ids)))
    return math.ceil(size / 32) * 32


def _product_dtype(hidden: Tensor, tables: Sequence[Tensor]) -> torch.dtype:
    """Type of the matrix products; autocast leaves fp64 alone, as in torch's own operations."""
    dtype = hidden.dtype
    for table in tables:
        dtype = torch.promote_types(dtype, table.dtype)
    device = hidden.device.type
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return dtype


def _sum_dtype(product_dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(product_dtype, torch.float32)


class _Settings(NamedTuple):
    product_dtype: torch.dtype
    chunk_size: int
    z_loss: float
    is_grad_enabled: bool


class _Tile(NamedTuple):
    """Consecutive rows of one table."""

    start: int
    """Id of the first row."""
    rows: Tensor
    """(v, D) in the type of the products."""
    gradient: Tensor | None
    """(v, D) view of the table's summed gradient; None where it needs none."""

    def locate(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Row of each target (n,), some row where it is in another tile, and whether it is in this one."""
        index = targets - self.start
        is_here = (index >= 0) & (index < len(self.rows))
        return index.clamp_(0, len(self.rows) - 1), is_here


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        settings: _Settings,
        hidden: Tensor,
        targets: Tensor,
        is_counted: Tensor,
        weights: Tensor,
        *tables: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Autograd also reports what needs a gradient where gradients are off.
        needed = [settings.is_grad_enabled and needed for needed in ctx.needs_input_grad]
        hidden_gradient = _zeros(hidden, weights.dtype) if needed[1] else None
        table_gradients = [
            _zeros(table, weights.dtype) if need else None
            for table, need in zip(tables, needed[5:], strict=True)
        ]
        token_losses, logsumexp = torch.zeros_like(weights), torch.zeros_like(weights)
        is_correct = torch.zeros_like(is_counted)
        # The products get their type here; autocast, on or off, finds nothing to cast.
        tiles = _split([table.to(settings.product_dtype) for table in tables], table_gradients)
        num_ids = sum(len(table) for table in tables) if any(needed) else 0
        buffer = weights.new_empty(min(settings.chunk_size, len(hidden)) * num_ids)
        for start in range(0, len(hidden), settings.chunk_size):
            chunk = slice(start, start + settings.chunk_size)
            x = hidden[chunk].to(settings.product_dtype).contiguous()
            logits = buffer[: num_ids * len(x)].view(num_ids, len(x)) if num_ids else None
            maxima, logsumexp[chunk], target_logits = _normalise(x, targets[chunk], tiles, logits)
            token_losses[chunk] = logsumexp[chunk] - target_logits
            is_correct[chunk] = target_logits == maxima.amax(0)
            if logits is not None:
                factors = (maxima - logsumexp[chunk]).exp_()
                factors *= weights[chunk] * (1 + 2 * settings.z_loss * logsumexp[chunk])
                gradient = None if hidden_gradient is None else hidden_gradient[chunk]
                _differentiate(x, targets[chunk], weights[chunk], tiles, logits, factors, gradient)
        token_losses = token_losses.where(is_counted, 0)
        loss = (weights * (token_losses + settings.z_loss * logsumexp.square())).sum()
        is_correct &= is_counted
        ctx.save_for_backward(hidden_gradient, *table_gradients)
        ctx.dtypes = [tensor.dtype for tensor in (hidden, *tables)]
        ctx.mark_non_differentiable(token_losses, is_correct)
        return loss, token_losses, is_correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # In place, as a table's gradient is the largest tensor left; autograd refuses a second backward.
        hidden_gradient, *table_gradients = (
            None if gradient is None else gradient.mul_(loss_gradient).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return None, hidden_gradient, None, None, None, *table_gradients


def _zeros(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A sum of gradients of a tensor."""
    return torch.zeros(tensor.shape, dtype=dtype, device=tensor.device)


def _split(tables: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[_Tile]:
    """Tiles of all tables in the order of the ids."""
    size = _CPU_TILE_ROWS if tables[0].device.type == "cpu" else _TILE_ROWS
    starts = accumulate((len(table) for table in tables[:-1]), initial=0)
    return [
        _Tile(start + k, table[k : k + size], None if gradient is None else gradient[k : k + size])
        for start, table, gradient in zip(starts, tables, gradients, strict=True)
        for k in range(0, len(table), size)
    ]


def _normalise(
    x: Tensor, targets: Tensor, tiles: list[_Tile], logits: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What normalises the logits of a chunk, and the exponentials themselves.

    The logits of a tile are in the cache all the while. With a maximum per tile there is no need to come back
    to them once the largest of all is known.

    Args:
        x: (n, D) hidden states.
        targets: (n,).
        tiles: of all tables.
        logits: (V, n), gets exp(logit - largest of its tile); None where they are not kept.

    Returns:
        Largest logits of each tile (tiles, n), logsumexp (n,), and the targets' logits (n,), -inf where the
        target is no id.
    """
    dtype = _sum_dtype(x.dtype)
    maxima = torch.empty(len(tiles), len(x), dtype=dtype, device=x.device)
    sums = torch.empty_like(maxima)
    target_logits = torch.full_like(maxima[0], -torch.inf)
    for k, tile in enumerate(tiles):
        scores = product(tile.rows, x).to(dtype)
        index, is_here = tile.locate(targets)
        target_logits = torch.where(is_here, scores.gather(0, index[None])[0], target_logits)
        torch.amax(scores, 0, out=maxima[k])
        out = scores if logits is None else logits[tile.start : tile.start + len(scores)]
        torch.sub(scores, maxima[k], out=out).exp_()
        torch.sum(out, 0, out=sums[k])
    return maxima, (maxima + sums.log_()).logsumexp(0), target_logits


def _differentiate(
    x: Tensor,
    targets: Tensor,
    weights: Tensor,
    tiles: list[_Tile],
    logits: Tensor,
    factors: Tensor,
    hidden_gradient: Tensor | None,
) -> None:
    """Add a chunk's gradients to the tiles', and write that of x into ``hidden_gradient``.

    The gradient of a logit is factor * exp(logit - largest of its tile) - weight * [id is the target], and takes
    the logit's place.

    Args:
        x: (n, D) hidden states.
        targets: (n,).
        weights: (n,), 0 where ignored.
        tiles: of all tables.
        logits: (V, n) as ``_normalise`` leaves them; overwritten.
        factors: (tiles, n).
        hidden_gradient: (n, D), None where it is not needed.
    """
    columns = torch.arange(len(x), device=x.device)
    x_transposed = x.t().contiguous()
    total = torch.zeros_like(x_transposed, dtype=logits.dtype)
    for k, tile in enumerate(tiles):
        gradient = logits[tile.start : tile.start + len(tile.rows)].mul_(factors[k])
        index, is_here = tile.locate(targets)
        gradient[index, columns] -= weights * is_here
        gradient = gradient.to(x.dtype)
        if tile.gradient is not None:
            tile.gradient.add_(product(gradient, x_transposed))
        if hidden_gradient is not None:
            total.add_(product(tile.rows.t(), gradient.t()))
    if hidden_gradient is not None:
        hidden_gradient.copy_(total.t())
