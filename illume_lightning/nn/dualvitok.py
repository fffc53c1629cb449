"""DualViTok: one picture as two grids of codes, semantic and pixel, decoded together (paper 3.1).

Shapes: B batch, H W image height and width in pixels, h1 w1 semantic grid, h2 w2 pixel grid (H/16, W/16),
D code dimension of one branch, Z channels of both branches together.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from illume_lightning.nn.draws import Source, normal
from illume_lightning.nn.noise import TokenNoise
from illume_lightning.nn.pixel import PixelDecoder, PixelEncoder
from illume_lightning.nn.semantic import SemanticDecoder, SemanticEncoder
from illume_lightning.nn.simvq import VQ, Quantized, SimVQ

Quantizer = SimVQ | VQ


@dataclass(frozen=True)
class DualCodes:
    """Code ids of a batch of pictures; a branch that the model does not have is ``None``.

    Attributes:
        semantic: (B, h1, w1) int64.
        pixel: (B, h2, w2) int64.
    """

    semantic: Tensor | None
    pixel: Tensor | None


@dataclass(frozen=True)
class Encoded:
    """Both branches before and after quantisation.

    Attributes:
        semantic: quantised semantic latents on the semantic grid, or ``None``.
        pixel: quantised pixel latents on the pixel grid, or ``None``.
        semantic_target: (B, C, h1, w1) features that the semantic decoder reconstructs, or ``None``.
        grid: (h2, w2), the pixel grid that both branches are merged on.
    """

    semantic: Quantized | None
    pixel: Quantized | None
    semantic_target: Tensor | None
    grid: tuple[int, int]

    @property
    def codes(self) -> DualCodes:
        """The code ids of both branches."""
        return DualCodes(
            self.semantic.indices if self.semantic else None, self.pixel.indices if self.pixel else None
        )


@dataclass(frozen=True)
class DualViTokOutput:
    """One forward pass.

    Attributes:
        reconstruction: (B, 3, H, W), about [-1, 1], not clamped.
        semantic_reconstruction: (B, C, h1, w1), or ``None`` without a semantic branch.
        encoded: the quantised branches and the semantic target.
    """

    reconstruction: Tensor
    semantic_reconstruction: Tensor | None
    encoded: Encoded


class DualViTok(nn.Module):
    """Dual visual tokenizer; leaving out a branch gives the single tokenizers of paper Table 6.

    Args:
        pixel_decoder: decodes both branches' codes into pixels; its ``latent_channels`` are the code
            dimensions of the branches together.
        semantic_encoder: frozen vision tower and blocks; given together with the next two, or not at all.
        semantic_quantizer: codebook of the semantic branch (32,768 codes in the paper).
        semantic_decoder: reconstructs the tower's features, for the training loss.
        pixel_encoder: MoVQGAN encoder; given together with ``pixel_quantizer``, or not at all.
        pixel_quantizer: codebook of the pixel branch (98,304 codes in the paper).
        noise: perturbs pixel codes in training, against wrong tokens (paper 3.1).

    Raises:
        ValueError: where parts are missing or their channels don't fit.
    """

    def __init__(
        self,
        pixel_decoder: PixelDecoder,
        semantic_encoder: SemanticEncoder | None = None,
        semantic_quantizer: SimVQ | VQ | None = None,
        semantic_decoder: SemanticDecoder | None = None,
        pixel_encoder: PixelEncoder | None = None,
        pixel_quantizer: SimVQ | VQ | None = None,
        noise: TokenNoise | None = None,
    ) -> None:
        super().__init__()
        _check_parts(semantic_encoder, semantic_quantizer, semantic_decoder, pixel_encoder, pixel_quantizer)
        channels = sum(q.dim for q in (semantic_quantizer, pixel_quantizer) if q is not None)
        if channels != pixel_decoder.latent_channels:
            raise ValueError(
                f"the quantisers give {channels} channels, pixel_decoder.latent_channels is "
                f"{pixel_decoder.latent_channels}: set it to {channels}."
            )
        self.semantic_encoder = semantic_encoder
        self.semantic_quantizer = semantic_quantizer
        self.semantic_decoder = semantic_decoder
        self.pixel_encoder = pixel_encoder
        self.pixel_quantizer = pixel_quantizer
        if pixel_encoder is not None and pixel_quantizer is not None:
            self.pixel_quant_conv = nn.Conv2d(pixel_encoder.latent_channels, pixel_quantizer.dim, 1)
        self.pixel_post_quant_conv = nn.Conv2d(channels, channels, 1)
        self.pixel_decoder = pixel_decoder
        self.noise = noise

    @property
    def quantizers(self) -> dict[str, Quantizer]:
        """The quantiser of each branch that the model has, by branch name."""
        branches = {"semantic": self.semantic_quantizer, "pixel": self.pixel_quantizer}
        return {name: quantizer for name, quantizer in branches.items() if quantizer is not None}

    def latents(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """Encode without quantising.

        Args:
            images: (B, 3, H, W) in [-1, 1], H and W divisible by 16.

        Returns:
            Latents by branch name, ``semantic`` (B, D, h1, w1) and ``pixel`` (B, D, h2, w2), and the
            semantic target (B, C, h1, w1) or ``None``.
        """
        latents, target = {}, None
        if self.semantic_encoder is not None:
            latents["semantic"], target = self.semantic_encoder(images)
        if self.pixel_encoder is not None:
            latents["pixel"] = self.pixel_quant_conv(self.pixel_encoder(images))
        return latents, target

    def encode(self, images: Tensor, latent_noise: float | None = None, generator: Source = None) -> Encoded:
        """Encode and quantise.

        Args:
            images: (B, 3, H, W) in [-1, 1], H and W divisible by 16.
            latent_noise: where given, nothing is quantised: Gaussian noise of this standard deviation takes
                the quantiser's place, indices are zero and the losses too (warm-up of small worlds; neither
                paper nor official release has it).
            generator: of that noise.

        Returns:
            Quantised branches, their losses and indices, and the semantic target.
        """
        latents, target = self.latents(images)
        quantized: dict[str, Quantized] = {}
        for name, quantizer in self.quantizers.items():
            if latent_noise is None:
                quantized[name] = quantizer(latents[name])
            else:
                z = latents[name].float()
                indices = torch.zeros_like(z[:, 0], dtype=torch.long)
                noise = latent_noise * normal(z.shape, generator, z.device)
                # Contiguous, as a quantiser's: else all that follows would run channels-last.
                features = (z + noise).to(quantizer.codebook_dtype).contiguous()
                quantized[name] = Quantized(features, z.new_zeros(()), indices)
        grid = (images.shape[-2] // 16, images.shape[-1] // 16)
        return Encoded(quantized.get("semantic"), quantized.get("pixel"), target, grid)

    def merge(
        self, semantic: Tensor | None, pixel: Tensor | None, grid: tuple[int, int], generator: Source = None
    ) -> Tensor:
        """Bring both branches onto the pixel grid: (B, Z, h2, w2), semantic channels first.

        Args:
            semantic: (B, D, h1, w1) quantised features, resized bicubically without antialiasing.
            pixel: (B, D, h2, w2) quantised features; perturbed in training where the model has noise.
            grid: (h2, w2).
            generator: of the perturbation.
        """
        parts = []
        if semantic is not None:
            resized = F.interpolate(semantic.float(), grid, mode="bicubic", align_corners=False)
            parts.append(resized.to(semantic.dtype))
        if pixel is not None:
            if self.noise is not None and self.training and self.pixel_quantizer is not None:
                pixel = self.noise(pixel, self.pixel_quantizer.codebook, generator)
            parts.append(pixel)
        return torch.cat(parts, dim=1)

    def decode(self, merged: Tensor) -> Tensor:
        """Merged features (B, Z, h2, w2) -> pictures (B, 3, H, W), about [-1, 1], not clamped."""
        return self.pixel_decoder(self.pixel_post_quant_conv(merged), merged)

    def code_features(self, codes: DualCodes, grid: tuple[int, int] | None = None) -> Tensor:
        """Codebook features of code ids on the pixel grid, (B, Z, h2, w2).

        Args:
            codes: ids of every branch that the model has.
            grid: (h2, w2); needed only without a pixel branch.

        Raises:
            ValueError: where a branch's ids are missing, or no grid can be told.
        """
        for name in self.quantizers:
            if getattr(codes, name) is None:
                raise ValueError(f"this DualViTok has a {name} branch, but the codes have no {name} ids.")
        if codes.pixel is not None:
            grid = (codes.pixel.shape[-2], codes.pixel.shape[-1])
        if grid is None:
            raise ValueError("codes without pixel ids need the pixel grid (H / 16, W / 16): pass grid.")
        features = {
            name: quantizer.codes_to_features(getattr(codes, name))
            for name, quantizer in self.quantizers.items()
        }
        return self.merge(features.get("semantic"), features.get("pixel"), grid)

    def decode_codes(self, codes: DualCodes, grid: tuple[int, int] | None = None) -> Tensor:
        """Code ids -> pictures (B, 3, H, W) clamped to [-1, 1]; arguments as ``code_features``."""
        return self.decode(self.code_features(codes, grid)).clamp(-1, 1)

    def forward(
        self, images: Tensor, latent_noise: float | None = None, generator: Source = None
    ) -> DualViTokOutput:
        """Reconstruct a batch of equally sized pictures; arguments as ``encode``, ``generator`` of all noise."""
        encoded = self.encode(images, latent_noise, generator)
        semantic = encoded.semantic.features if encoded.semantic else None
        pixel = encoded.pixel.features if encoded.pixel else None
        reconstruction = self.decode(self.merge(semantic, pixel, encoded.grid, generator))
        features = None
        if semantic is not None and self.semantic_decoder is not None:
            features = self.semantic_decoder(semantic)
        return DualViTokOutput(reconstruction, features, encoded)


def _check_parts(
    semantic_encoder: SemanticEncoder | None,
    semantic_quantizer: Quantizer | None,
    semantic_decoder: SemanticDecoder | None,
    pixel_encoder: PixelEncoder | None,
    pixel_quantizer: Quantizer | None,
) -> None:
    semantic = [semantic_encoder, semantic_quantizer, semantic_decoder]
    if any(part is None for part in semantic) and any(part is not None for part in semantic):
        raise ValueError(
            "the semantic branch is semantic_encoder, semantic_quantizer and semantic_decoder: give all "
            "three, or none for a pixel-only tokenizer."
        )
    if (pixel_encoder is None) != (pixel_quantizer is None):
        raise ValueError(
            "the pixel branch is pixel_encoder and pixel_quantizer: give both, or none for a semantic-only "
            "tokenizer."
        )
    if semantic_encoder is None and pixel_encoder is None:
        raise ValueError("DualViTok needs a semantic branch, a pixel branch, or both; it got neither.")
    if semantic_encoder is not None and semantic_quantizer is not None:
        code_dim = semantic_encoder.proj_out[0].out_features
        if code_dim != semantic_quantizer.dim:
            raise ValueError(
                f"semantic_encoder.code_dim is {code_dim}, semantic_quantizer.dim is "
                f"{semantic_quantizer.dim}: they must be equal."
            )
