"""Vector quantisers of DualViTok: SimVQ (paper 3.1) and plain VQ (Table 8), and their nearest-code search.

Shapes: B batch, N tokens, K codes, D code dimension, h w grid of tokens.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from illume_lightning.nn.matmul import product

# Codes per block of the search. Only a block's best score is kept in the first pass; a smaller block makes
# the second pass cheaper and the list of block scores longer.
_BLOCK = 64
# Scores held per tile of tokens (8 MiB of fp32), whatever the size of the codebook.
_BLOCK_SCORES = 2**21


@torch.no_grad()
def nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest code of each token by Euclidean distance; among equal distances the lowest index.

    The result is that of distances in fp64. A first pass scores all codes in fp32, one cache-sized tile at
    a time, and keeps the best score of each block of codes. A second pass measures, in fp64, only the blocks
    that the rounding error of the first pass leaves in question, which is one block for nearly every token.
    Extra memory is a few dozen MiB, whatever N and K.

    Args:
        x: (N, D) tokens, any floating type.
        codebook: (K, D) codes, any floating type.

    Returns:
        (N,) int64, values in [0, K). A token with a NaN gets index 0.

    Raises:
        ValueError: where the shapes don't fit, or there is no code.
    """
    if x.ndim != 2 or codebook.ndim != 2 or x.shape[1] != codebook.shape[1] or len(codebook) == 0:
        raise ValueError(
            f"tokens {tuple(x.shape)} can't be compared with codes {tuple(codebook.shape)}: expected (N, D) "
            "and (K, D) with the same D and at least one code."
        )
    num_blocks = math.ceil(len(codebook) / _BLOCK)
    tile = max(64, min(2048, _BLOCK_SCORES // num_blocks))
    codes = codebook.float()
    norms = torch.linalg.vector_norm(codes, dim=1)
    indices = torch.empty(len(x), dtype=torch.long, device=x.device)
    scores = codes.new_empty(num_blocks, min(tile, len(x)))
    with _full_precision_matmul():
        for start in range(0, len(x), tile):
            tokens = x[start : start + tile]
            best = scores[:, : len(tokens)]
            _score_blocks(tokens.float(), codes, norms, out=best)
            margin = _score_error(tokens, norms.max())
            block, token = (best >= best.amax(0) - 2 * margin).nonzero(as_tuple=True)
            indices[start : start + tile] = _nearest_in_blocks(tokens, codebook, block, token)
    return indices


def _score_blocks(tokens: Tensor, codes: Tensor, norms: Tensor, out: Tensor) -> None:
    """Write each block's largest x.c - |c|^2 / 2 into ``out`` (blocks, N); it grows as the distance falls."""
    # A tile that stays in the cache (4 MiB) on the CPU, one that fills the device (64 MiB) elsewhere.
    num_codes, num_tokens = (2048, 512) if tokens.device.type == "cpu" else (8192, 2048)
    dim = codes.shape[1]
    # One more dimension, 1 for tokens and -|c|^2 / 2 for codes, puts the whole score into the product.
    tokens = F.pad(tokens, (0, 1), value=1.0)
    for k in range(0, len(codes), num_codes):
        size = min(num_codes, len(codes) - k)
        tile = codes.new_zeros(size + -size % _BLOCK, dim + 1)
        tile[:size, :dim] = codes[k : k + size]
        tile[:size, dim] = -0.5 * norms[k : k + size].square()
        tile[size:, dim] = -torch.inf
        blocks = slice(k // _BLOCK, (k + len(tile)) // _BLOCK)
        for t in range(0, len(tokens), num_tokens):
            scores = product(tile, tokens[t : t + num_tokens])
            torch.amax(scores.unflatten(0, (-1, _BLOCK)), 1, out=out[blocks, t : t + num_tokens])


def _score_error(tokens: Tensor, largest_norm: Tensor) -> Tensor:
    """Bound on the rounding error of one score, (N,).

    A sum of D products has a relative error of at most D u in terms of |x| |c| in any order of summation; the
    slack covers |c|^2 / 2, its place in the sum, rounding to fp32, and this bound's own rounding.
    """
    dim = tokens.shape[1]
    norm = torch.linalg.vector_norm(tokens.float(), dim=1)
    unit_roundoff = 2.0**-24
    underflow = dim * torch.finfo(torch.float32).tiny
    return (dim + 12) * unit_roundoff * largest_norm * (norm + largest_norm) + underflow


def _nearest_in_blocks(tokens: Tensor, codebook: Tensor, block: Tensor, token: Tensor) -> Tensor:
    """Nearest code of each token (N,) among its candidate blocks, pairs (P,) of block and token, in fp64.

    NPUs and Apple's GPUs have no fp64: there fp32 decides between codes that are nearly as far.
    """
    wide = torch.float32 if tokens.device.type in ("npu", "mps") else torch.float64
    num_codes, dim = codebook.shape
    offsets = torch.arange(_BLOCK, device=tokens.device)
    distance = torch.empty(len(block), dtype=wide, device=tokens.device)
    index = torch.empty_like(block)
    chunk = max(1, 2**18 // (_BLOCK * dim))
    for p in range(0, len(block), chunk):
        pairs = slice(p, p + chunk)
        # The last block may be short: its last code then stands in for the missing ones, and is found first.
        ids = (block[pairs, None] * _BLOCK + offsets).clamp_max_(num_codes - 1)
        squares = codebook[ids].to(wide).sub_(tokens[token[pairs], None]).square_().sum(-1)
        distance[pairs], position = squares.min(1)
        index[pairs] = ids.gather(1, position[:, None])[:, 0]
    nearest = torch.full((len(tokens),), torch.inf, dtype=wide, device=tokens.device)
    nearest.scatter_reduce_(0, token, distance, "amin")
    index = torch.where(distance == nearest[token], index, num_codes)
    lowest = torch.full((len(tokens),), num_codes, device=tokens.device)
    lowest.scatter_reduce_(0, token, index, "amin")
    return torch.where(lowest < num_codes, lowest, 0)


@contextmanager
def _full_precision_matmul() -> Iterator[None]:
    """Keep TF32 and bf16 out of fp32 products, where the error bound of the search would not hold."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


@dataclass(frozen=True)
class Quantized:
    """Quantised latents.

    Attributes:
        features: (B, D, h, w) codes of the tokens; gradients pass straight through to the latents.
        loss: () codebook and commitment loss.
        indices: (B, h, w) int64 code ids.
    """

    features: Tensor
    loss: Tensor
    indices: Tensor


class _Quantizer(nn.Module):
    """What both quantisers share; a subclass says where the codes are."""

    def __init__(self, codebook_size: int, dim: int, commitment: float, rotation_trick: bool) -> None:
        super().__init__()
        if codebook_size < 1 or dim < 1:
            raise ValueError(
                f"codebook_size is {codebook_size} and dim is {dim}: both must be at least 1 (paper: 32768 "
                "or 98304 codes of dimension 32)."
            )
        self.codebook_size = codebook_size
        self.dim = dim
        self.commitment = commitment
        self.rotation_trick = rotation_trick

    @property
    def codebook(self) -> Tensor:
        """All codes, (K, D)."""
        raise NotImplementedError

    def _lookup(self, indices: Tensor) -> Tensor:
        """Codes of ids of any shape, (..., D), with gradient."""
        raise NotImplementedError

    def _set_codebook(self, codes: Tensor) -> None:
        """Let ``codebook`` be ``codes`` (K, D)."""
        raise NotImplementedError

    def forward(self, latents: Tensor) -> Quantized:
        """Quantise latents (B, D, h, w) of any floating type; computed in fp32, under autocast too.

        The features are the codes bit for bit, so that they equal ``codes_to_features`` of the indices (in
        the official release they differ by a rounding of the straight-through sum).
        """
        if latents.ndim != 4 or latents.shape[1] != self.dim:
            raise ValueError(f"latents are {tuple(latents.shape)}, expected (B, {self.dim}, h, w).")
        with torch.autocast(latents.device.type, enabled=False):
            x = latents.float().permute(0, 2, 3, 1)
            with torch.no_grad():
                indices = nearest_code(x.reshape(-1, self.dim), self.codebook).view(x.shape[:-1])
            codes = self._lookup(indices).float()
            loss = F.mse_loss(codes, x.detach()) + self.commitment * F.mse_loss(x, codes.detach())
            # x - x.detach() is zero with the gradient of x.
            features = rotate_to(x, codes) if self.rotation_trick else codes.detach() + (x - x.detach())
        return Quantized(self._channel_first(features), loss, indices)

    @property
    def codebook_dtype(self) -> torch.dtype:
        """Type of the features: that of the parameters, half only in a model that is half as a whole."""
        return next(self.parameters()).dtype

    def codes_to_features(self, indices: Tensor) -> Tensor:
        """Code ids (B, h, w) int64 -> features (B, D, h, w)."""
        with torch.autocast(indices.device.type, enabled=False):
            return self._channel_first(self._lookup(indices))

    def _channel_first(self, codes: Tensor) -> Tensor:
        # Contiguous, or all convolutions and norms after it would silently run channels-last.
        return codes.permute(0, 3, 1, 2).to(self.codebook_dtype).contiguous()

    @torch.no_grad()
    def initialise_codebook(self, features: Tensor, generator: torch.Generator | None = None) -> None:
        """Start the codebook from data: k-means centres of latents.

        For worlds too small to fill a random codebook; neither paper nor official release does it.

        Args:
            features: (N, D) latents; with fewer than K of them, noisy copies make up the number.
            generator: of the random draws, on the CPU.

        Raises:
            ValueError: where the features are not (N, D), or there are none, or they are not finite.
        """
        if features.ndim != 2 or features.shape[1] != self.dim or len(features) == 0:
            raise ValueError(f"features are {tuple(features.shape)}, expected (N, {self.dim}) with N > 0.")
        if not torch.isfinite(features).all():
            raise ValueError("features have NaN or infinite values: a codebook can't start from them.")
        # On the CPU the sums are the same in every process of a run.
        self._set_codebook(kmeans(features.float().cpu(), self.codebook_size, generator))


class SimVQ(_Quantizer):
    """Frozen random codebook behind one trained linear layer (SimVQ; paper 3.1).

    Args:
        codebook_size: K (paper: 32,768 semantic, 98,304 pixel).
        dim: D (paper: 32; Table 8: 8, 16, 32).
        commitment: weight of the term that draws latents to their codes.
        rotation_trick: carry gradients back by rotation instead of straight through (official release: off).
    """

    def __init__(
        self, codebook_size: int, dim: int = 32, commitment: float = 0.25, rotation_trick: bool = False
    ) -> None:
        super().__init__(codebook_size, dim, commitment, rotation_trick)
        self.frozen_codebook: Tensor
        self.register_buffer("frozen_codebook", torch.randn(codebook_size, dim) * dim**-0.5)
        self.code_transform = nn.Linear(dim, dim, bias=False)

    @property
    def codebook(self) -> Tensor:
        """The projected codes, (K, D) fp32."""
        with torch.autocast(self.frozen_codebook.device.type, enabled=False):
            return F.linear(self.frozen_codebook.float(), self.code_transform.weight.float())

    def _lookup(self, indices: Tensor) -> Tensor:
        # Projecting only the codes in use keeps (K, D) gradients out of the backward pass.
        return F.linear(self.frozen_codebook[indices].float(), self.code_transform.weight.float())

    def _set_codebook(self, codes: Tensor) -> None:
        self.frozen_codebook.copy_(codes)
        nn.init.eye_(self.code_transform.weight)


class VQ(_Quantizer):
    """Vanilla VQ: every code is a parameter (paper Table 8, after VQGAN).

    Args:
        codebook_size: K.
        dim: D.
        commitment: weight of the term that draws latents to their codes.
        rotation_trick: carry gradients back by rotation instead of straight through.
    """

    def __init__(
        self, codebook_size: int, dim: int = 32, commitment: float = 0.25, rotation_trick: bool = False
    ) -> None:
        super().__init__(codebook_size, dim, commitment, rotation_trick)
        bound = 1 / codebook_size
        self.embedding = nn.Parameter(torch.empty(codebook_size, dim).uniform_(-bound, bound))

    @property
    def codebook(self) -> Tensor:
        """The codes, (K, D)."""
        return self.embedding

    def _lookup(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self.embedding)

    def _set_codebook(self, codes: Tensor) -> None:
        self.embedding.copy_(codes)


def rotate_to(x: Tensor, codes: Tensor) -> Tensor:
    """Rotate and scale each latent onto its code, with rotation and scale constant in the backward pass.

    Fifty et al., "Restructuring vector quantization with the rotation trick" (2024).

    Args:
        x: (..., D) latents.
        codes: (..., D) their codes; no gradient reaches them.

    Returns:
        (..., D), equal to ``codes`` up to rounding.
    """
    source, target = x.detach(), codes.detach()
    source_norm = source.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    target_norm = target.norm(dim=-1, keepdim=True)
    u, v = source / source_norm, target / target_norm.clamp_min(1e-6)
    # Two reflections, in the mean direction and in v, are the rotation from u to v.
    mean = F.normalize(u + v, dim=-1, eps=1e-6)
    rotated = x - 2 * (x * mean).sum(-1, keepdim=True) * mean + 2 * (x * u).sum(-1, keepdim=True) * v
    return rotated * (target_norm / source_norm)


def kmeans(
    features: Tensor, num_centres: int, generator: torch.Generator | None = None, steps: int = 8
) -> Tensor:
    """Lloyd's k-means from randomly chosen features.

    Args:
        features: (N, D) fp32; with fewer than ``num_centres``, copies with noise of a tenth of each
            dimension's standard deviation make up the number.
        num_centres: K.
        generator: of the draws, on the features' device.
        steps: Lloyd steps. A centre that no feature is nearest to stays where it is.

    Returns:
        (K, D).
    """
    missing = num_centres - len(features)
    if missing > 0:
        spread = 0.1 * features.std(0, correction=0)
        chosen = torch.randint(len(features), (missing,), generator=generator)
        noise = torch.randn(missing, features.shape[1], generator=generator)
        return torch.cat([features, features[chosen] + spread * noise])
    centres = features[torch.randperm(len(features), generator=generator)[:num_centres]]
    for _ in range(steps):
        nearest = nearest_code(features, centres)
        counts = torch.bincount(nearest, minlength=num_centres)[:, None]
        sums = torch.zeros_like(centres).index_add_(0, nearest, features)
        centres = torch.where(counts > 0, sums / counts.clamp_min(1), centres)
    return centres
