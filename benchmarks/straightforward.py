"""DualViTok written down plainly, to measure against: NCHW, eager, nothing fused.

Every operation is the one that the paper and the official release name: GroupNorm as ``nn.GroupNorm``,
attention as softmax(QK)V, SpatialNorm on features upsampled to full resolution, the quantiser by
``torch.cdist`` and ``argmin``. Parameter names equal the published checkpoint's, so the same weights load in
both.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from illume_lightning.nn.semantic import QwenVisionTower, patchify


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(QK / sqrt(d)) V over (..., N, d)."""
    weights = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1)
    return weights @ v


class SpatialNorm(nn.Module):
    """GroupNorm, scaled and shifted by 1x1 convolutions of the features at full resolution."""

    def __init__(self, channels: int, condition_channels: int) -> None:
        super().__init__()
        self.norm_layer = nn.GroupNorm(32, channels, eps=1e-6)
        self.conv_y = nn.Conv2d(condition_channels, channels, 1)
        self.conv_b = nn.Conv2d(condition_channels, channels, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(B, C, H, W) and (B, Z, h, w) -> (B, C, H, W)."""
        condition = F.interpolate(condition, size=x.shape[-2:], mode="nearest")
        return self.norm_layer(x) * self.conv_y(condition) + self.conv_b(condition)


def norm(channels: int, condition_channels: int | None) -> nn.Module:
    """GroupNorm in the encoder, SpatialNorm in the decoder."""
    if condition_channels is None:
        return nn.GroupNorm(32, channels, eps=1e-6)
    return SpatialNorm(channels, condition_channels)


def normalise(layer: nn.Module, x: Tensor, condition: Tensor | None) -> Tensor:
    """Call either norm."""
    return layer(x) if condition is None else layer(x, condition)


def swish(x: Tensor) -> Tensor:
    """The activation as MoVQGAN writes it."""
    return x * torch.sigmoid(x)


class ResBlock(nn.Module):
    """Norm, swish, conv, twice, and a skip connection."""

    def __init__(self, inputs: int, outputs: int, condition_channels: int | None) -> None:
        super().__init__()
        self.norm1 = norm(inputs, condition_channels)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = norm(outputs, condition_channels)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H, W)."""
        h = self.conv1(swish(normalise(self.norm1, x, condition)))
        h = self.conv2(swish(normalise(self.norm2, h, condition)))
        if self.nin_shortcut is not None:
            x = self.nin_shortcut(x)
        return x + h


class AttnBlock(nn.Module):
    """Single-head attention over all positions."""

    def __init__(self, channels: int, condition_channels: int | None) -> None:
        super().__init__()
        self.norm = norm(channels, condition_channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        h = normalise(self.norm, x, condition)
        q, k, v = (conv(h).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))
        return x + self.proj_out(attention(q, k, v).transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Conv to a quarter of the channels and space-to-channel; shortcut: space-to-channel and channel mean."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels // 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H/2, W/2)."""
        shortcut = F.pixel_unshuffle(x, 2).unflatten(1, (x.shape[1], 4)).mean(2)
        return F.pixel_unshuffle(self.conv(x), 2) + shortcut


class Upsample(nn.Module):
    """Conv to four times the channels and channel-to-space; shortcut: repeated channels, channel-to-space."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W)."""
        return F.pixel_shuffle(self.conv(x), 2) + F.pixel_shuffle(x.repeat_interleave(4, dim=1), 2)


class Level(nn.Module):
    """Blocks of one resolution; the resampling layer is added by the encoder or decoder."""

    def __init__(self, widths: list[int], has_attention: bool, condition: int | None) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(widths))
        self.block = nn.ModuleList(ResBlock(inputs, outputs, condition) for inputs, outputs in pairs)
        self.attn = nn.ModuleList(AttnBlock(outputs, condition) for _, outputs in pairs if has_attention)

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        for i, block in enumerate(self.block):
            x = block(x, condition)
            if len(self.attn) > 0:
                x = self.attn[i](x, condition)
        return x


class Middle(nn.Module):
    """Block, attention, block."""

    def __init__(self, channels: int, condition: int | None) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, condition)
        self.attn_1 = AttnBlock(channels, condition)
        self.block_2 = ResBlock(channels, channels, condition)

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        return self.block_2(self.attn_1(self.block_1(x, condition), condition), condition)


MULTIPLIERS = (1, 1, 2, 2, 4)


class PixelEncoder(nn.Module):
    """MoVQGAN encoder with DC downsampling."""

    def __init__(self, channels: int, latent_channels: int) -> None:
        super().__init__()
        widths = [channels * m for m in MULTIPLIERS]
        self.latent_channels = latent_channels
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.down = nn.ModuleList()
        before = channels
        for i, width in enumerate(widths):
            level = Level([before, width, width], i == 4, None)
            if i < 4:
                level.downsample = Downsample(width)
            self.down.append(level)
            before = width
        self.mid = Middle(before, None)
        self.norm_out = nn.GroupNorm(32, before, eps=1e-6)
        self.conv_out = nn.Conv2d(before, latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, Z, h, w)."""
        x = self.conv_in(x)
        for i, level in enumerate(self.down):
            x = level(x, None)
            if i < 4:
                x = level.downsample(x)
        x = swish(self.norm_out(self.mid(x, None)))
        return self.conv_out(x) + x.unflatten(1, (self.latent_channels, -1)).mean(2)


class PixelDecoder(nn.Module):
    """MoVQGAN decoder with SpatialNorm and DC upsampling."""

    def __init__(self, channels: int, latent_channels: int) -> None:
        super().__init__()
        widths = [channels * m for m in MULTIPLIERS]
        self.repeats = widths[-1] // latent_channels
        self.conv_in = nn.Conv2d(latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], latent_channels)
        levels, before = [], widths[-1]
        for i in reversed(range(5)):
            level = Level([before] + [widths[i]] * 3, i == 4, latent_channels)
            if i > 0:
                level.upsample = Upsample(widths[i])
            levels.insert(0, level)
            before = widths[i]
        self.up = nn.ModuleList(levels)
        self.norm_out = SpatialNorm(before, latent_channels)
        self.conv_out = nn.Conv2d(before, 3, 3, padding=1)

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:
        """(B, Z, h, w) twice -> (B, 3, H, W)."""
        x = self.conv_in(z) + z.repeat_interleave(self.repeats, dim=1)
        x = self.mid(x, condition)
        for i in reversed(range(5)):
            x = self.up[i](x, condition)
            if i > 0:
                x = self.up[i].upsample(x)
        return self.conv_out(swish(self.norm_out(x, condition)))


class SimVQ(nn.Module):
    """Quantiser by ``torch.cdist`` over blocks of 32,768 codes."""

    def __init__(self, codebook_size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("frozen_codebook", torch.empty(codebook_size, dim))
        self.code_transform = nn.Linear(dim, dim, bias=False)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D, h, w) -> straight-through codes of that shape, and the loss."""
        x = latents.float().permute(0, 2, 3, 1)
        codebook = self.code_transform(self.frozen_codebook).float()
        with torch.no_grad():
            tokens, distances, indices = x.flatten(0, 2), [], []
            for start in range(0, len(codebook), 32768):
                block = torch.cdist(tokens, codebook[start : start + 32768])
                index = block.argmin(1, keepdim=True)
                distances.append(block.gather(1, index))
                indices.append(index + start)
            nearest = torch.cat(distances, 1).argmin(1, keepdim=True)
            index = torch.cat(indices, 1).gather(1, nearest)[:, 0]
        codes = codebook[index].view(x.shape)
        loss = F.mse_loss(codes, x.detach()) + 0.25 * F.mse_loss(x, codes.detach())
        return (x + (codes - x).detach()).permute(0, 3, 1, 2), loss


class VisionAttention(nn.Module):
    """Multi-head attention with 2D-RoPE."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = (self._rotate(y.float(), angles).to(v.dtype) for y in (q, k))
        return self.proj(attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width))

    @staticmethod
    def _rotate(x: Tensor, angles: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat([-right, left], dim=-1) * angles.sin()


class Mlp(nn.Module):
    """Linear, quick GELU, linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class VisionBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.attn = VisionAttention(width, num_heads)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        x = x + self.attn(self.norm1(x), angles)
        return x + self.mlp(self.norm2(x))


def grid_angles(rows: int, cols: int, head_dim: int) -> Tensor:
    """RoPE angles (rows * cols, head_dim) of a row-major grid."""
    frequency = 10000.0 ** (-torch.arange(0, head_dim // 2, 2).float() / (head_dim // 2))
    row = torch.arange(rows).repeat_interleave(cols)[:, None] * frequency
    col = torch.arange(cols).repeat(rows)[:, None] * frequency
    return torch.cat([row, col], dim=1).repeat(1, 2)


class SemanticEncoder(nn.Module):
    """Frozen tower and blocks down to the code dimension."""

    def __init__(
        self, model: QwenVisionTower, num_blocks: int, width: int, num_heads: int, code_dim: int
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.proj_in = nn.Conv2d(model.out_features, width, 1)
        self.blocks = nn.ModuleList(VisionBlock(width, num_heads) for _ in range(num_blocks))
        self.proj_out = nn.Sequential(nn.Linear(width, code_dim))
        self.model = model.requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> latents (B, D, h, w) and targets (B, C, h, w)."""
        patches, (rows, cols) = patchify(images)
        grid = torch.tensor([[1, rows, cols]]).expand(len(images), 3)
        features = self.model(patches, grid_thw=grid).pooler_output
        rows, cols = rows // 2, cols // 2
        target = F.layer_norm(features, features.shape[-1:], eps=1e-6).view(len(images), rows, cols, -1)
        target = target.permute(0, 3, 1, 2)
        x = self.proj_in(target).flatten(2).transpose(1, 2)
        angles = grid_angles(rows, cols, x.shape[-1] // self.num_heads)
        for block in self.blocks:
            x = block(x, angles)
        return self.proj_out(x).transpose(1, 2).unflatten(2, (rows, cols)), target


class SemanticDecoder(nn.Module):
    """Blocks and a projection back to the tower's features."""

    def __init__(self, code_dim: int, num_blocks: int, width: int, num_heads: int, out_features: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.proj_in = nn.Linear(code_dim, width)
        self.blocks = nn.ModuleList(VisionBlock(width, num_heads) for _ in range(num_blocks))
        self.proj_out = nn.Sequential(nn.Linear(width, out_features), nn.LayerNorm(out_features))

    def forward(self, latents: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, C, h, w)."""
        rows, cols = latents.shape[-2:]
        x = self.proj_in(latents.flatten(2).transpose(1, 2))
        angles = grid_angles(rows, cols, x.shape[-1] // self.num_heads)
        for block in self.blocks:
            x = block(x, angles)
        return self.proj_out(x).transpose(1, 2).unflatten(2, (rows, cols))


class DualViTok(nn.Module):
    """Both branches; ``forward`` gives the training loss."""

    def __init__(self, sizes: dict[str, int], tower: QwenVisionTower) -> None:
        super().__init__()
        blocks, width, heads = sizes["num_blocks"], sizes["width"], sizes["num_heads"]
        tower.config._attn_implementation = "eager"
        self.semantic_encoder = SemanticEncoder(tower, blocks, width, heads, 32)
        self.semantic_quantizer = SimVQ(sizes["semantic_codes"], 32)
        self.semantic_decoder = SemanticDecoder(32, blocks, width, heads, tower.out_features)
        self.pixel_encoder = PixelEncoder(sizes["encoder_channels"], 32)
        self.pixel_quantizer = SimVQ(sizes["pixel_codes"], 32)
        self.pixel_quant_conv = nn.Conv2d(32, 32, 1)
        self.pixel_post_quant_conv = nn.Conv2d(64, 64, 1)
        self.pixel_decoder = PixelDecoder(sizes["decoder_channels"], 64)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [-1, 1] -> reconstruction of that shape and the loss without perception and GAN."""
        latents, target = self.semantic_encoder(images)
        semantic, semantic_loss = self.semantic_quantizer(latents)
        pixel, pixel_loss = self.pixel_quantizer(self.pixel_quant_conv(self.pixel_encoder(images)))
        resized = F.interpolate(semantic, pixel.shape[-2:], mode="bicubic", align_corners=False)
        merged = torch.cat([resized, pixel], dim=1)
        reconstruction = self.pixel_decoder(self.pixel_post_quant_conv(merged), merged)
        cosine = F.cosine_similarity(self.semantic_decoder(semantic).float(), target.float(), dim=1)
        loss = F.l1_loss(reconstruction.float(), images) + semantic_loss + pixel_loss + (1 - cosine).mean()
        return reconstruction, loss
