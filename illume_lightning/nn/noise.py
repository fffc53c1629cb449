"""Perturbing codes in tokenizer training, so that the decoder bears wrong tokens (paper 3.1, Table 9)."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from illume_lightning.nn.draws import Source, integers, uniform

NoiseKind = Literal["none", "random", "neighbour", "zero"]


class TokenNoise(nn.Module):
    """Replace some codes of some samples.

    A sample is perturbed with ``sample_probability``; of its positions each is replaced with
    ``token_probability``. The replacement carries no gradient.

    Args:
        kind: ``random``: a code drawn uniformly from the codebook (paper); ``neighbour``: the code at the
            same position of the batch's previous sample (official release; nothing happens in a batch of
            one, and which sample that is depends on how they are dealt to devices); ``zero``: zeros;
            ``none``: leave everything as it is.
        sample_probability: in [0, 1] (paper 3.1: 0.1).
        token_probability: in [0, 1] (paper 3.1: 0.1).

    Raises:
        ValueError: for another kind, or a probability outside [0, 1].
    """

    def __init__(
        self, kind: NoiseKind = "random", sample_probability: float = 0.1, token_probability: float = 0.1
    ) -> None:
        super().__init__()
        if kind not in get_args(NoiseKind):
            raise ValueError(f"kind is {kind!r}, expected one of {', '.join(get_args(NoiseKind))}.")
        probabilities = {"sample_probability": sample_probability, "token_probability": token_probability}
        for name, value in probabilities.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}, expected a probability in [0, 1].")
        self.kind = kind
        self.sample_probability = sample_probability
        self.token_probability = token_probability

    def forward(self, features: Tensor, codebook: Tensor, generator: Source = None) -> Tensor:
        """Perturb quantised features; the caller does so in training only.

        Args:
            features: (B, D, h, w) quantised features.
            codebook: (K, D) codes that ``random`` draws from.
            generator: of all draws, on any device; ``None`` draws on the features' device. Samples are drawn
                first, then positions, then codes.

        Returns:
            (B, D, h, w), with gradient where the features are kept.
        """
        if self.kind == "none":
            return features
        batch, _, height, width = features.shape
        device = features.device
        sample = uniform((batch, 1, 1, 1), generator, device)
        token = uniform((batch, 1, height, width), generator, device)
        is_replaced = (sample < self.sample_probability) & (token < self.token_probability)
        if self.kind == "random":
            codes = codebook.detach()[integers(len(codebook), (batch, height, width), generator, device)]
            replacement = codes.permute(0, 3, 1, 2).to(features.dtype)
        elif self.kind == "neighbour":
            replacement = features.detach().roll(1, dims=0)
        else:
            replacement = torch.zeros_like(features)
        return torch.where(is_replaced, replacement, features)
