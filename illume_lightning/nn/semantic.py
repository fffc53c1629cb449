"""Semantic branch of DualViTok: a frozen Qwen2-VL vision tower, 2D-RoPE blocks and the feature decoder.

Shapes: B batch, H W image height and width in pixels, h w semantic grid (28 px a cell), N = h*w tokens,
D block width, C features of the tower's merger (3584 at full size).
Parameter names equal the published checkpoint's (paper 3.1; official release).
"""

import pickle

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from illume_lightning.nn.casting import KeepsBuffers
from illume_lightning.resolution import semantic_input_size

PATCH = 14
MERGE = 2
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class QwenVisionTower(KeepsBuffers, Qwen2VisionTransformerPretrainedModel):
    """Qwen2-VL's vision tower, built from sizes or loaded from a checkpoint.

    Args:
        depth: number of blocks (32 in the paper's Qwen2-VL ViT).
        width: channels of a block.
        num_heads: attention heads of a block.
        out_features: channels C of the merger's output, one vector per 28x28 pixels.
        pretrained: local folder or hub id of a Qwen2-VL vision tower in Hugging Face layout; its weights
            replace the random ones, and its sizes must equal the arguments.
    """

    def __init__(
        self,
        depth: int = 32,
        width: int = 1280,
        num_heads: int = 16,
        out_features: int = 3584,
        pretrained: str | None = None,
    ) -> None:
        super().__init__(
            Qwen2VLVisionConfig(depth=depth, embed_dim=width, num_heads=num_heads, hidden_size=out_features)
        )
        if pretrained is not None:
            try:
                source = Qwen2VisionTransformerPretrainedModel.from_pretrained(
                    pretrained, dtype=torch.float32
                )
            except (pickle.UnpicklingError, SafetensorError) as error:
                raise ValueError(
                    f"{pretrained} holds more than tensors, which could run code, or is broken: give a vision tower "
                    "in safetensors"
                ) from error
            self.load_state_dict(source.state_dict())

    @property
    def out_features(self) -> int:
        """Channels C of a merged feature."""
        return self.config.hidden_size

    def features(self, images: Tensor) -> Tensor:
        """Merged features of a batch of equally sized images.

        Args:
            images: (B, 3, H, W) in [-1, 1].

        Returns:
            (B, C, h, w) with h, w the semantic grid of ``resolution.grids``, row-major.
        """
        patches, (rows, cols) = patchify(images)
        grid = torch.tensor([[1, rows, cols]]).expand(images.shape[0], 3)
        merged = self(patches, grid_thw=grid.to(images.device)).pooler_output
        return merged.view(images.shape[0], rows // MERGE, cols // MERGE, -1).permute(0, 3, 1, 2)


def patchify(images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Scale, normalise and cut images into the rows that the vision tower reads.

    The image is resized (bicubic, antialiased, in fp32) to the semantic branch's size, clamped to [0, 1],
    normalised with CLIP's statistics, and cut into 14x14 patches ordered by 2x2 merge blocks; the single
    frame stands twice because the tower's patches are two frames deep.

    Args:
        images: (B, 3, H, W) in [-1, 1].

    Returns:
        (B * rows * cols, 3 * 2 * 14 * 14) patches, and (rows, cols), the grid of 14-pixel patches.
    """
    batch, channels, *size = images.shape
    height, width = semantic_input_size(size[0], size[1])
    x = (images.float() + 1) / 2
    x = F.interpolate(x, (height, width), mode="bicubic", align_corners=False, antialias=True)
    x = x.to(images.dtype).clamp(0, 1)
    mean = x.new_tensor(CLIP_MEAN).view(1, 3, 1, 1)
    std = x.new_tensor(CLIP_STD).view(1, 3, 1, 1)
    x = (x - mean) / std
    rows, cols = height // PATCH, width // PATCH
    x = x.view(batch, channels, rows // MERGE, MERGE, PATCH, cols // MERGE, MERGE, PATCH)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(batch * rows * cols, channels, 1, PATCH * PATCH)
    return x.expand(-1, -1, 2, -1).reshape(batch * rows * cols, -1), (rows, cols)


def rotary_2d(rows: int, cols: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of 2D-RoPE for a row-major grid, each (rows * cols, head_dim), fp32.

    The first half of the rotated pairs turns with the row, the second with the column.
    """
    frequency = 10000.0 ** (-torch.arange(0, head_dim // 2, 2, device=device).float() / (head_dim // 2))
    row = torch.arange(rows, device=device).repeat_interleave(cols)
    col = torch.arange(cols, device=device).repeat(rows)
    angle = torch.cat([row[:, None] * frequency, col[:, None] * frequency], dim=1).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply a rotary embedding to (B, heads, N, head_dim), in fp32, and cast back."""
    y = x.float()
    left, right = y.chunk(2, dim=-1)
    return (y * cos + torch.cat([-right, left], dim=-1) * sin).to(x.dtype)


class VisionAttention(nn.Module):
    """Full self-attention over one image's tokens with 2D-RoPE."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(rotate(q, *rotary), rotate(k, *rotary), v)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, width))


class QuickGELUMlp(nn.Module):
    """Two linear layers with x * sigmoid(1.702 x) between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class VisionBlock(nn.Module):
    """Pre-norm transformer block of the semantic encoder and decoder (paper 4.1: attention with 2D-RoPE)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.attn = VisionAttention(width, num_heads)
        self.mlp = QuickGELUMlp(width, 4 * width)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        x = x + self.attn(self.norm1(x), rotary)
        return x + self.mlp(self.norm2(x))


def _xavier(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class SemanticEncoder(nn.Module):
    """Frozen vision tower followed by trainable blocks down to the code dimension.

    Args:
        model: the text-aligned vision tower; frozen here.
        num_blocks: trainable 2D-RoPE blocks after the tower (4 in the official release; the paper names
            only the decoder's).
        width: channels D of these blocks.
        num_heads: attention heads of these blocks.
        code_dim: channels of the output, equal to the quantiser's code dimension.
    """

    def __init__(
        self,
        model: QwenVisionTower,
        num_blocks: int = 4,
        width: int = 1280,
        num_heads: int = 16,
        code_dim: int = 32,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        # A 1x1 convolution by name and shape, as published; applied as a linear layer.
        self.proj_in = nn.Conv2d(model.out_features, width, 1)
        self.blocks = nn.ModuleList(VisionBlock(width, num_heads) for _ in range(num_blocks))
        self.proj_out = nn.Sequential(nn.Linear(width, code_dim))
        self.apply(_xavier)
        self.model = model.requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode a batch of equally sized images.

        Args:
            images: (B, 3, H, W) in [-1, 1].

        Returns:
            Latents (B, code_dim, h, w), and the target of the semantic decoder (B, C, h, w): the tower's
            features under a LayerNorm without affine parameters (official release).
        """
        with torch.no_grad():
            features = self.model.features(images).permute(0, 2, 3, 1)
            target = F.layer_norm(features, features.shape[-1:], eps=1e-6)
        batch, rows, cols, _ = target.shape
        x = F.linear(target.flatten(1, 2), self.proj_in.weight.flatten(1), self.proj_in.bias)
        rotary = rotary_2d(rows, cols, x.shape[-1] // self.num_heads, x.device)
        for block in self.blocks:
            x = block(x, rotary)
        latents = self.proj_out(x).view(batch, rows, cols, -1)
        return latents.permute(0, 3, 1, 2), target.permute(0, 3, 1, 2)


class SemanticDecoder(nn.Module):
    """Reconstructs the tower's features from quantised latents (paper 3.1: the lightweight decoder).

    Args:
        code_dim: channels of the quantised latents.
        num_blocks: 2D-RoPE blocks (paper 4.1: 4).
        width: channels D of the blocks.
        num_heads: attention heads of the blocks.
        out_features: channels C of the reconstructed features.
    """

    def __init__(
        self,
        code_dim: int = 32,
        num_blocks: int = 4,
        width: int = 1280,
        num_heads: int = 16,
        out_features: int = 3584,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.proj_in = nn.Linear(code_dim, width)
        self.blocks = nn.ModuleList(VisionBlock(width, num_heads) for _ in range(num_blocks))
        self.proj_out = nn.Sequential(nn.Linear(width, out_features), nn.LayerNorm(out_features))
        self.apply(_xavier)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, code_dim, h, w) -> (B, C, h, w)."""
        batch, _, rows, cols = latents.shape
        x = self.proj_in(latents.permute(0, 2, 3, 1).flatten(1, 2))
        rotary = rotary_2d(rows, cols, x.shape[-1] // self.num_heads, x.device)
        for block in self.blocks:
            x = block(x, rotary)
        return self.proj_out(x).view(batch, rows, cols, -1).permute(0, 3, 1, 2)
