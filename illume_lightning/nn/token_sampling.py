"""Drawing the next token from logits: guidance, temperature, top-k, top-p."""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor


def drawing_seed(*names: object) -> int:
    """A seed of 32 bits for what has these names, such as a run's seed and a line's id: always the same."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, names)).encode()).digest()[:4], "big")


@dataclass(frozen=True)
class SegmentSampling:
    """How tokens of one kind are drawn: temperature first, then the top k, then the top p of those.

    Raises:
        ValueError: if a number is out of range.
    """

    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""

    top_k: int = 0
    """Only so many of the most likely tokens are drawn from; 0, or more than there are, means all."""

    top_p: float = 1.0
    """Only the most likely tokens that together first reach this probability are drawn from."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}: choose 0 (the most likely token) or more")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}: choose 1 or more, or 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_p is {self.top_p}: choose more than 0 and at most 1, which means all tokens"
            )


@dataclass(frozen=True)
class TokenSampling:
    """How an answer is drawn. The defaults are the official release's, except for its words at temperature 1.

    Raises:
        ValueError: if guidance is not finite.
    """

    text: SegmentSampling = SegmentSampling(temperature=0.0)
    """Words, and the sizes of pictures that come within them."""

    semantic: SegmentSampling = SegmentSampling(top_k=2048)
    """Semantic codes."""

    pixel: SegmentSampling = SegmentSampling(top_k=6144)
    """Pixel codes."""

    guidance: float = 2.0
    """Scale s of classifier-free guidance of codes: u + s (c - u); 1 is none, and costs nothing."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance is {self.guidance}: choose a number, 1 for none")


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """Logits u + s (c - u), (n, K); up to a constant of each row this is guidance of log-probabilities.

    Args:
        conditional: c, (n, K).
        unconditional: u, (n, K).
        scale: s, one number or (n, 1).
    """
    return unconditional + scale * (conditional - unconditional)


def restrict(logits: Tensor, sampling: SegmentSampling) -> Tensor:
    """Logits (n, K) over the temperature, with -inf for what is not drawn from.

    Tokens as likely as the last one that is kept are kept too. Temperature 0 counts as 1 here.
    """
    scores = logits / (sampling.temperature or 1.0)
    if 0 < sampling.top_k < scores.shape[-1]:
        last = scores.topk(sampling.top_k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        scores = scores.masked_fill(scores < last, -torch.inf)
    if sampling.top_p < 1:
        falling = scores.sort(dim=-1, descending=True).values
        probabilities = falling.softmax(-1)
        # A token is drawn from if those before it don't reach top_p; the first always is.
        count = (_running_sum(probabilities) - probabilities <= sampling.top_p).sum(-1, keepdim=True)
        last = falling.gather(-1, count.clamp(min=1) - 1)
        scores = scores.masked_fill(scores < last, -torch.inf)
    return scores


def draw(logits: Tensor, sampling: SegmentSampling, uniforms: Tensor) -> Tensor:
    """Draw one token of every row: the inverse of the distribution function at a given number.

    Args:
        logits: (n, K), -inf for what can't come.
        sampling: settings.
        uniforms: (n,) in [0, 1); equal numbers draw equal tokens, whatever the other rows are.

    Returns:
        (n,) from 0 to K - 1.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities = restrict(logits.float(), sampling).softmax(-1)
    # Accelerators sum in parallel, and rounding may lift the sum where nothing is added: such tokens don't count.
    distribution = _running_sum(probabilities).masked_fill(probabilities == 0, 0)
    total = distribution.amax(-1, keepdim=True)
    # Rounding may not carry a number to the end, behind which nothing is.
    below = torch.nextafter(total, torch.zeros_like(total))
    wanted = torch.minimum(uniforms[:, None].to(total.dtype) * total, below)
    return (distribution > wanted).byte().argmax(-1)


def _running_sum(x: Tensor) -> Tensor:
    if x.is_cuda and torch.are_deterministic_algorithms_enabled():
        return x.cpu().cumsum(-1).to(x.device)  # torch has no deterministic one on CUDA, and refuses
    return x.cumsum(-1)
