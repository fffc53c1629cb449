"""Pixel branch of DualViTok: MoVQGAN encoder and decoder with DC down- and up-sampling (paper 3.1, Table 7).

Shapes: B batch, C channels, H W height and width in pixels, h w pixel grid (16 px a cell), Z latent
channels. Parameter names equal the published checkpoint's (official release).
"""

import itertools
from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Resampling = Literal["dc", "origin"]


class Norm(nn.GroupNorm):
    """GroupNorm with the decoder norm's call: the condition is accepted and not used."""

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__(num_groups, channels, eps=1e-6)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return super().forward(x)


class SpatialNorm(nn.Module):
    """MoVQ's norm: GroupNorm scaled and shifted per position by the quantised features.

    The 1x1 convolutions run at the grid's resolution and their results are repeated: the same as repeating
    the features first, without full-resolution convolutions.
    """

    def __init__(self, channels: int, condition_channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm_layer = Norm(channels, num_groups)
        self.conv_y = nn.Conv2d(condition_channels, channels, 1)
        self.conv_b = nn.Conv2d(condition_channels, channels, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(B, C, H, W) and condition (B, Z, h, w) with H = h * 2^n -> (B, C, H, W)."""
        x = self.norm_layer(x)
        scale, shift = self.conv_y(condition), self.conv_b(condition)
        if not x.is_contiguous():
            # Channels-last: repeating is fast, sums over broadcast rows in the backward pass are not.
            size = x.shape[-2:]
            return x * F.interpolate(scale, size) + F.interpolate(shift, size)
        # Repeat columns only and broadcast rows: nothing of full resolution is made but the result.
        factor = x.shape[-2] // condition.shape[-2]
        rows = x.unflatten(2, (-1, factor))
        return (rows * _repeat_columns(scale, factor) + _repeat_columns(shift, factor)).flatten(2, 3)


def _repeat_columns(grid: Tensor, factor: int) -> Tensor:
    """(B, C, h, w) -> (B, C, h, 1, w * factor), each column ``factor`` times."""
    return grid[:, :, :, None, :, None].expand(-1, -1, -1, -1, -1, factor).flatten(4)


def _norm(channels: int, num_groups: int, condition_channels: int | None) -> nn.Module:
    if channels % num_groups:
        raise ValueError(
            f"{channels} channels can't be split into {num_groups} norm groups: choose channels that are a "
            "multiple of norm_groups, or fewer norm_groups."
        )
    if condition_channels is None:
        return Norm(channels, num_groups)
    return SpatialNorm(channels, condition_channels, num_groups)


class ResBlock(nn.Module):
    """Two norm-SiLU-conv3x3 layers and a skip connection."""

    def __init__(self, inputs: int, outputs: int, num_groups: int, condition_channels: int | None) -> None:
        super().__init__()
        self.norm1 = _norm(inputs, num_groups, condition_channels)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = _norm(outputs, num_groups, condition_channels)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H, W)."""
        h = self.conv1(F.silu(self.norm1(x, condition)))
        h = self.conv2(F.silu(self.norm2(h, condition)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, with a skip connection."""

    def __init__(self, channels: int, num_groups: int, condition_channels: int | None) -> None:
        super().__init__()
        self.norm = _norm(channels, num_groups, condition_channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        h = self.norm(x, condition)
        q, k, v = (conv(h).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(out.transpose(1, 2).view_as(x))


class Downsample(nn.Module):
    """Halve height and width.

    ``dc``: conv3x3 to a quarter of the channels, space-to-channel, plus the 2x2 average of the input (DC-AE;
    paper 3.1). ``origin``: MoVQGAN's strided conv3x3 (paper Table 7).
    """

    def __init__(self, channels: int, resampling: Resampling) -> None:
        super().__init__()
        self.is_dc = resampling == "dc"
        if self.is_dc:
            self.conv = nn.Conv2d(channels, channels // 4, 3, padding=1)
        else:
            self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H/2, W/2)."""
        if self.is_dc:
            # Space-to-channel of the input averaged over groups of four channels is the 2x2 average.
            return F.pixel_unshuffle(self.conv(x), 2) + F.avg_pool2d(x, 2)
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width.

    ``dc``: conv3x3 to four times the channels, channel-to-space, plus the repeated input (DC-AE; paper 3.1).
    ``origin``: MoVQGAN's repeat and conv3x3 (paper Table 7).
    """

    def __init__(self, channels: int, resampling: Resampling) -> None:
        super().__init__()
        self.is_dc = resampling == "dc"
        self.conv = nn.Conv2d(channels, 4 * channels if self.is_dc else channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W)."""
        repeated = F.interpolate(x, scale_factor=2.0)
        return F.pixel_shuffle(self.conv(x), 2) + repeated if self.is_dc else self.conv(repeated)


class Level(nn.Module):
    """Blocks of one resolution: ``block``, ``attn`` (may be empty) and, where set, a resampling layer."""

    downsample: nn.Module
    upsample: nn.Module

    def __init__(
        self,
        widths: Sequence[int],
        num_groups: int,
        has_attention: bool,
        condition_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResBlock(inputs, outputs, num_groups, condition_channels)
            for inputs, outputs in itertools.pairwise(widths)
        )
        self.attn = nn.ModuleList(
            AttnBlock(width, num_groups, condition_channels) for width in widths[1:] if has_attention
        )

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W), or (B, C', H/2, W/2), or (B, C', 2H, 2W)."""
        for i, block in enumerate(self.block):
            x = block(x, condition)
            if self.attn:
                x = self.attn[i](x, condition)
        if hasattr(self, "downsample"):
            return self.downsample(x)
        return self.upsample(x) if hasattr(self, "upsample") else x


class Middle(nn.Module):
    """Block, attention and block at the lowest resolution; without attention where no level has any."""

    def __init__(self, channels: int, num_groups: int, has_attention: bool, condition: int | None) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, num_groups, condition)
        if has_attention:
            self.attn_1 = AttnBlock(channels, num_groups, condition)
        self.block_2 = ResBlock(channels, channels, num_groups, condition)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        x = self.block_1(x, condition)
        if hasattr(self, "attn_1"):
            x = self.attn_1(x, condition)
        return self.block_2(x, condition)


class PixelEncoder(nn.Module):
    """MoVQGAN encoder.

    Args:
        channels: base channels (paper 4.1: 128).
        multipliers: channels of each level as multiples of the base; ``len - 1`` halvings.
        num_res_blocks: residual blocks per level.
        attention_levels: indices of levels with attention; where any level attends, the middle does too.
        latent_channels: channels Z of the output.
        resampling: ``dc`` (paper) or ``origin`` (Table 7); ``dc`` adds the channel-group mean to the output.
        norm_groups: groups of every GroupNorm.
    """

    def __init__(
        self,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        attention_levels: Sequence[int] = (4,),
        latent_channels: int = 32,
        resampling: Resampling = "dc",
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        self.factor = 2 ** (len(multipliers) - 1)
        self.latent_channels = latent_channels
        self.resampling = resampling
        widths = [channels * multiplier for multiplier in multipliers]
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.down = nn.ModuleList()
        before = channels
        for i, width in enumerate(widths):
            level = Level([before] + [width] * num_res_blocks, norm_groups, i in attention_levels)
            if i < len(widths) - 1:
                level.downsample = Downsample(width, resampling)
            self.down.append(level)
            before = width
        self.mid = Middle(before, norm_groups, bool(attention_levels), None)
        self.norm_out = Norm(before, norm_groups)
        self.conv_out = nn.Conv2d(before, latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], any floating type -> (B, Z, h, w)."""
        x = self.conv_in(images.to(self.conv_in.weight.dtype))
        for level in self.down:
            x = level(x)
        x = F.silu(self.norm_out(self.mid(x)))
        latents = self.conv_out(x)
        if self.resampling == "dc":
            latents = latents + x.unflatten(1, (self.latent_channels, -1)).mean(2)
        return latents


class PixelDecoder(nn.Module):
    """MoVQGAN decoder, conditioned on the quantised features at every norm.

    Args:
        channels: base channels (paper 4.1: 384).
        multipliers: channels of each level as multiples of the base, from full to lowest resolution.
        num_res_blocks: residual blocks per level (MoVQGAN counts one more than in its encoder).
        attention_levels: indices of levels with attention; where any level attends, the middle does too.
        latent_channels: channels Z of both inputs (64: semantic and pixel codes side by side).
        resampling: ``dc`` (paper) or ``origin`` (Table 7); ``dc`` adds the repeated input at the entry.
        norm_groups: groups of every GroupNorm.
    """

    def __init__(
        self,
        channels: int = 384,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 3,
        attention_levels: Sequence[int] = (4,),
        latent_channels: int = 64,
        resampling: Resampling = "dc",
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        self.latent_channels = latent_channels
        widths = [channels * multiplier for multiplier in multipliers]
        before = widths[-1]
        self.resampling = resampling
        self.repeats = before // latent_channels
        self.conv_in = nn.Conv2d(latent_channels, before, 3, padding=1)
        self.mid = Middle(before, norm_groups, bool(attention_levels), latent_channels)
        levels = []
        for i, width in reversed(list(enumerate(widths))):
            level = Level(
                [before] + [width] * num_res_blocks, norm_groups, i in attention_levels, latent_channels
            )
            if i > 0:
                level.upsample = Upsample(width, resampling)
            levels.append(level)
            before = width
        # Stored by level index: up.0 is full resolution.
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = SpatialNorm(before, latent_channels, norm_groups)
        self.conv_out = nn.Conv2d(before, 3, 3, padding=1)

    @property
    def last_layer(self) -> Tensor:
        """Weight of the output convolution, where the adaptive GAN weight compares gradients."""
        return self.conv_out.weight

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:
        """Decode.

        Args:
            z: (B, Z, h, w) features after the post-quantiser convolution.
            condition: (B, Z, h, w) quantised features before it.

        Returns:
            (B, 3, H, W), about [-1, 1], not clamped.
        """
        x = self.conv_in(z)
        if self.resampling == "dc":
            x = x + z.repeat_interleave(self.repeats, dim=1)
        x = self.mid(x, condition)
        for level in reversed(self.up):
            x = level(x, condition)
        return self.conv_out(F.silu(self.norm_out(x, condition)))
