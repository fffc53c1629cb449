"""Diffusion decoder: codes to pictures of twice the size, with SDXL's UNet (paper 3.3, 3.4).

Shapes: B batch, H W height and width of the output in pixels, h2 w2 pixel grid of the codes (H/32, W/32),
Z channels of both branches' codebook features together, C channels and h w size of a latent.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, SchedulerMixin, UNet2DConditionModel
from torch import Tensor, nn

from illume_lightning.nn.draws import Source, integers, normal
from illume_lightning.nn.latents import SpaceToDepth, VAELatents
from illume_lightning.resolution import DECODER_SIZES, PIXEL_STRIDE, Size, decoder_size_index

SCALE = 2
"""The output is this many times the size that the codes stand for (paper 3.3)."""


def build_unet(
    latent_channels: int = 4,
    condition_channels: int = 64,
    channels: Sequence[int] = (320, 640, 1280),
    transformer_layers: Sequence[int] = (0, 2, 10),
    head_dim: int = 64,
    cross_attention_dim: int = 2048,
    pooled_dim: int = 1280,
    time_dim: int = 256,
    norm_groups: int = 32,
    num_res_blocks: int = 2,
) -> UNet2DConditionModel:
    """A UNet of SDXL's kind whose input is the noisy latent with the condition behind it; SDXL's by default.

    Args:
        latent_channels: C, of the noisy latent and the output.
        condition_channels: Z, of the codebook features.
        channels: of every level, from full to lowest resolution of the latent.
        transformer_layers: of every level; a level with 0 has no attention.
        head_dim: channels of an attention head.
        cross_attention_dim: of the text embeddings, which are zero here (paper 3.3).
        pooled_dim: of the pooled text embedding, zero too.
        time_dim: of each of the six micro-conditions' embeddings.
        norm_groups: of every GroupNorm.
        num_res_blocks: of every level on the way down; on the way up there is one more.
    """
    attends = [layers > 0 for layers in transformer_layers]
    return UNet2DConditionModel(
        in_channels=latent_channels + condition_channels,
        out_channels=latent_channels,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        block_out_channels=tuple(channels),
        transformer_layers_per_block=tuple(max(1, layers) for layers in transformer_layers),
        attention_head_dim=tuple(max(1, width // head_dim) for width in channels),
        cross_attention_dim=cross_attention_dim,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=time_dim,
        projection_class_embeddings_input_dim=6 * time_dim + pooled_dim,
        norm_num_groups=norm_groups,
        layers_per_block=num_res_blocks,
    )


def sdxl_unet(pretrained: str, condition_channels: int = 64) -> UNet2DConditionModel:
    """SDXL's UNet from a published folder or hub name, with room for the condition.

    Args:
        pretrained: a diffusers pipeline with a folder ``unet``.
        condition_channels: Z. A UNet that takes the condition already (published decoder) is left as it is.

    Raises:
        ValueError: if its input is neither the latent alone nor the latent with this condition.
    """
    unet = UNet2DConditionModel.from_pretrained(pretrained, subfolder="unet")
    return widen_input(unet, condition_channels)


def widen_input(unet: UNet2DConditionModel, condition_channels: int) -> UNet2DConditionModel:
    """Add input channels whose weights are zero: whatever they hold, the prediction stays what it was.

    Raises:
        ValueError: if the input has further channels already, but not this many.
    """
    given, latent = unet.config.in_channels, unet.config.out_channels
    if given == latent + condition_channels:
        return unet
    if given != latent:
        raise ValueError(
            f"the UNet takes {given} channels; expected {latent} (a latent alone) or "
            f"{latent + condition_channels} (with {condition_channels} channels of codebook features)"
        )
    narrow = unet.conv_in
    wide = nn.Conv2d(
        given + condition_channels, narrow.out_channels, narrow.kernel_size, padding=narrow.padding
    )
    wide = wide.to(narrow.weight.device, narrow.weight.dtype)
    with torch.no_grad():
        wide.weight.zero_()
        wide.weight[:, :given] = narrow.weight
        wide.bias.copy_(narrow.bias)
    unet.conv_in = wide
    unet.register_to_config(in_channels=given + condition_channels)
    return unet


class DiffusionDecoder(nn.Module):
    """Latent diffusion on the codes' features.

    Args:
        unet: predicts noise, velocity or latent, as the scheduler's ``prediction_type`` says.
        latents: pictures to latents and back: SDXL's VAE, or space-to-depth where there is none to download.
        scheduler: the noise of training; its betas and prediction type hold for sampling too.
        min_snr_gamma: weight of the loss at a timestep, Hang et al. 2023; ``None`` weighs all alike.
        sizes: the output sizes (height, width) whose number is the micro-condition.
        transposed_sizes: read them as (width, height) instead, see ``decoder_size_index``.
        num_text_tokens: zero embeddings that cross-attention sees. All give the same result, because zero
            keys and values are alike; the official release computes 77.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        latents: VAELatents | SpaceToDepth,
        scheduler: DDPMScheduler,
        min_snr_gamma: float | None = None,
        sizes: Sequence[Size] = DECODER_SIZES,
        transposed_sizes: bool = False,
        num_text_tokens: int = 1,
    ) -> None:
        super().__init__()
        if unet.config.out_channels != latents.channels:
            raise ValueError(
                f"the UNet predicts {unet.config.out_channels} channels, the latents have {latents.channels}: "
                f"set the UNet's latent_channels to {latents.channels}."
            )
        self.unet = unet
        self.latents = latents.requires_grad_(False).eval()
        self.scheduler = scheduler
        self.min_snr_gamma = min_snr_gamma
        self.sizes = [(height, width) for height, width in sizes]
        self.transposed_sizes = transposed_sizes
        self.num_text_tokens = num_text_tokens

    @property
    def condition_channels(self) -> int:
        """Z, the channels of the codes' features."""
        return self.unet.config.in_channels - self.latents.channels

    def train(self, mode: bool = True) -> "DiffusionDecoder":
        """The latents stay in evaluation mode."""
        super().train(mode)
        self.latents.eval()
        return self

    def predict(self, noisy: Tensor, timesteps: Tensor, features: Tensor) -> Tensor:
        """The UNet's output (B, C, h, w).

        Args:
            noisy: (B, C, h, w), scaled as the scheduler wants it; in any floating type.
            timesteps: (B,).
            features: (B, Z, h2, w2) codebook features; repeated to the latent's size.
        """
        noisy = noisy.to(self.unet.conv_in.weight.dtype)
        batch, _, height, width = noisy.shape
        self._check_features(features)
        output = (features.shape[-2] * PIXEL_STRIDE * SCALE, features.shape[-1] * PIXEL_STRIDE * SCALE)
        number = decoder_size_index(output, self.sizes, self.transposed_sizes)
        condition = F.interpolate(features.to(noisy.dtype), (height, width), mode="nearest")
        config = self.unet.config
        pooled_dim = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        # Original size, crop and target size are zero but for the last number (official release).
        time_ids = noisy.new_zeros(batch, 6)
        time_ids[:, 5] = number
        return self.unet(
            torch.cat([noisy, condition], dim=1),
            timesteps,
            noisy.new_zeros(batch, self.num_text_tokens, config.cross_attention_dim),
            added_cond_kwargs={"text_embeds": noisy.new_zeros(batch, pooled_dim), "time_ids": time_ids},
        ).sample

    def loss(self, latents: Tensor, features: Tensor, generator: Source = None) -> Tensor:
        """Denoising loss of every sample (B,), at random timesteps.

        Args:
            latents: (B, C, h, w) of the pictures.
            features: (B, Z, h2, w2) codebook features, perturbed and dropped already.
            generator: of timesteps and noise.
        """
        num_timesteps = self.scheduler.config.num_train_timesteps
        timesteps = integers(num_timesteps, latents.shape[:1], generator, latents.device)
        noise = normal(latents.shape, generator, latents.device).to(latents.dtype)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        predicted = self.predict(noisy, timesteps, features).float()
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            target = noise
        elif kind == "v_prediction":
            target = self.scheduler.get_velocity(latents, noise, timesteps)
        else:
            target = latents
        return (predicted - target).square().mean((1, 2, 3)) * self._weight(timesteps)

    def _weight(self, timesteps: Tensor) -> Tensor:
        if self.min_snr_gamma is None:
            return torch.ones_like(timesteps, dtype=torch.float32)
        kept = self.scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
        snr = kept / (1 - kept)
        clipped = snr.clamp(max=self.min_snr_gamma)
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            return clipped / snr.clamp(min=1e-8)
        return clipped / (snr + 1) if kind == "v_prediction" else clipped

    @torch.no_grad()
    def sample(
        self,
        features: Tensor,
        scheduler: SchedulerMixin,
        num_steps: int = 50,
        guidance: float = 2.0,
        seeds: Sequence[int] | None = None,
    ) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] from codebook features.

        Args:
            features: (B, Z, h2, w2).
            scheduler: any of diffusers' whose ``step`` takes prediction, timestep and sample.
            num_steps: forward passes of the UNet.
            guidance: ``u + guidance * (c - u)`` with zero features as the unconditional branch, both in one
                forward pass; up to 1 there is none.
            seeds: (B,) of the noise; a picture depends on its own only. ``None``: 0 to B - 1.

        Raises:
            ValueError: if the features fit no output size, or ``num_steps`` is not positive.
            FloatingPointError: if a picture came out not finite.
        """
        if num_steps < 1:
            raise ValueError(f"num_steps is {num_steps}, it must be at least 1")
        self._check_features(features)
        output = (features.shape[-2] * PIXEL_STRIDE * SCALE, features.shape[-1] * PIXEL_STRIDE * SCALE)
        shape = (self.latents.channels, output[0] // self.latents.factor, output[1] // self.latents.factor)
        seeds = range(len(features)) if seeds is None else seeds
        # Drawn on the CPU: every device gets the same noise from the same seed.
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = [torch.randn(shape, generator=each, dtype=torch.float32) for each in generators]
        scheduler.set_timesteps(num_steps, device=features.device)
        latents = torch.stack(noise).to(features.device) * scheduler.init_noise_sigma
        is_guided = guidance > 1
        condition = torch.cat([torch.zeros_like(features), features]) if is_guided else features
        for timestep in scheduler.timesteps:
            noisy = scheduler.scale_model_input(torch.cat([latents] * 2) if is_guided else latents, timestep)
            predicted = self.predict(noisy, timestep.expand(len(noisy)), condition).float()
            if is_guided:
                unconditional, conditional = predicted.chunk(2)
                predicted = unconditional + guidance * (conditional - unconditional)
            latents = scheduler.step(predicted, timestep, latents, return_dict=False)[0]
        pictures = self.latents.decode(latents).clamp(-1, 1)
        broken = [number for number, picture in enumerate(pictures) if not picture.isfinite().all()]
        if broken:
            raise FloatingPointError(
                f"pictures {broken} of {len(pictures)} came out not finite; sample in fp32, or with a lower guidance "
                f"than {guidance}"
            )
        return pictures

    def _check_features(self, features: Tensor) -> None:
        if features.ndim != 4 or features.shape[1] != self.condition_channels:
            raise ValueError(
                f"codebook features have shape {tuple(features.shape)}, this decoder takes (B, "
                f"{self.condition_channels}, h2, w2): use the DualViTok that it was trained with."
            )


def sampling_scheduler(
    class_path: str, training: DDPMScheduler, options: dict[str, Any] | None = None
) -> Any:
    """One of diffusers' schedulers with the betas and prediction type of training.

    Args:
        class_path: such as ``diffusers.DDIMScheduler``.
        training: the scheduler that the decoder was trained with.
        options: that replace its own, such as ``{timestep_spacing: trailing}``.

    Raises:
        ValueError: if there is no such class, or it is no scheduler.
    """
    import diffusers

    package, _, name = class_path.rpartition(".")
    scheduler = getattr(diffusers, name, None) if package == "diffusers" else None
    if scheduler is None or not hasattr(scheduler, "set_timesteps"):
        raise ValueError(
            f"scheduler {class_path!r} is none of diffusers' schedulers, such as diffusers.DDIMScheduler"
        )
    return scheduler.from_config({**training.config, **(options or {})})


def save_decoder(decoder: DiffusionDecoder, folder: str | Path) -> None:
    """Write the published layout: a diffusers folder with ``unet``, ``vae`` and ``scheduler``.

    Raises:
        ValueError: if the latents are not a VAE's.
    """
    if not isinstance(decoder.latents, VAELatents):
        raise ValueError(
            "a decoder with SpaceToDepth latents has no VAE to write: the published layout needs one"
        )
    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    decoder.unet.save_pretrained(partial / "unet")
    decoder.latents.vae.save_pretrained(partial / "vae")
    decoder.scheduler.save_pretrained(partial / "scheduler")
    partial.rename(folder)


def load_decoder(
    pretrained: str, condition_channels: int = 64, sizes: Sequence[Size] = DECODER_SIZES, **options: Any
) -> DiffusionDecoder:
    """Read the published layout (official release: ``dualvitok-sdxl-decoder``), or SDXL to start from.

    Args:
        pretrained: folder or hub name with ``unet``, ``vae`` and ``scheduler``.
        condition_channels: Z.
        sizes: the output sizes.
        options: of ``DiffusionDecoder``.

    Raises:
        ValueError: if the UNet takes another condition.
    """
    scheduler = DDPMScheduler.from_pretrained(pretrained, subfolder="scheduler")
    unet = sdxl_unet(pretrained, condition_channels)
    return DiffusionDecoder(unet, VAELatents(pretrained), scheduler, sizes=sizes, **options)
