"""What the diffusion decoder is conditioned on: codes, made unreliable in training (paper 3.3)."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from illume_lightning.nn.draws import Source, integers, uniform
from illume_lightning.nn.dualvitok import DualCodes, DualViTok


@dataclass(frozen=True)
class ConditionNoise:
    """Wrong codes and missing branches.

    Raises:
        ValueError: for a probability outside [0, 1].
    """

    sample_probability: float = 0.5
    """Share of samples with wrong codes (paper 3.3)."""

    token_probability: float = 0.1
    """Share of such a sample's codes, of both branches, that are replaced (paper 3.3)."""

    semantic_drop: float = 0.1
    """Share of samples whose semantic features are zero (paper 3.3)."""

    pixel_drop: float = 0.5
    """Share of samples whose pixel features are zero, drawn independently (paper 3.3)."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value <= 1:
                raise ValueError(f"{field.name} is {value}, expected a probability in [0, 1].")

    def replace(self, codes: DualCodes, tokenizer: DualViTok, generator: Source = None) -> DualCodes:
        """Replace codes of some samples; the same samples in both branches."""
        present = codes.pixel if codes.pixel is not None else codes.semantic
        assert present is not None
        perturbed = uniform(present.shape[:1], generator, present.device) < self.sample_probability
        probability = perturbed.float() * self.token_probability
        return replace_codes(codes, tokenizer, probability, generator)

    def drop(self, features: Tensor, tokenizer: DualViTok, generator: Source = None) -> Tensor:
        """Set a branch's features (B, Z, h2, w2) to zero in some samples, each branch by itself."""
        rates = {"semantic": self.semantic_drop, "pixel": self.pixel_drop}
        parts = features.split([quantizer.dim for quantizer in tokenizer.quantizers.values()], dim=1)
        kept = [
            part * (uniform((len(part), 1, 1, 1), generator, part.device) >= rates[name])
            for name, part in zip(tokenizer.quantizers, parts, strict=True)
        ]
        return torch.cat(kept, dim=1)


def replace_codes(
    codes: DualCodes,
    tokenizer: DualViTok,
    probability: Tensor | float,
    generator: Source = None,
) -> DualCodes:
    """Replace each code, with a probability, by one drawn uniformly from its codebook.

    Args:
        codes: ids of the branches that the tokenizer has.
        tokenizer: knows the codebooks' sizes.
        probability: of each code, or (B,) of each sample's codes.
        generator: of the draws; ``None`` draws on the codes' device.
    """
    replaced: dict[str, Tensor | None] = {"semantic": None, "pixel": None}
    for name, quantizer in tokenizer.quantizers.items():
        ids = getattr(codes, name)
        draws = uniform(ids.shape, generator, ids.device)
        wrong = integers(quantizer.codebook_size, ids.shape, generator, ids.device)
        limit = torch.as_tensor(probability, dtype=torch.float32, device=ids.device).view(-1, 1, 1)
        replaced[name] = torch.where(draws < limit, wrong, ids)
    return DualCodes(**replaced)


def check_codes(codes: Mapping[str, Tensor | None], grids: Mapping[str, tuple[int, int]]) -> None:
    """Refuse code grids that don't belong to one picture size.

    Raises:
        ValueError: names the branch and both grids.
    """
    for name, ids in codes.items():
        if ids is not None and tuple(ids.shape[-2:]) != grids[name]:
            raise ValueError(
                f"{name} codes form a grid of {ids.shape[-2]} x {ids.shape[-1]}; beside pixel codes of "
                f"{grids['pixel'][0]} x {grids['pixel'][1]} it must be {grids[name][0]} x {grids[name][1]}"
            )
