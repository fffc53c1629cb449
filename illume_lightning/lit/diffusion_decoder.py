"""Training, sampling and evaluation of the diffusion decoder (paper 3.3, 3.4, Table 1)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from illume_lightning.data.latents import LatentBatch
from illume_lightning.lit.datamodule import ImageBatch
from illume_lightning.lit.dualvitok import to_float, to_uint8
from illume_lightning.lit.memory_layout import follow_weights, use_channels_last
from illume_lightning.lit.reconstruction_metrics import Distance, PictureMetrics, tower_distance
from illume_lightning.lit.saved_run import SavedRun
from illume_lightning.lit.sharding import shard
from illume_lightning.lit.tokenizer import check_cached_codes, check_maker, fingerprint, load_tokenizer
from illume_lightning.lit.training import TrainingModule
from illume_lightning.nn.condition import ConditionNoise, check_codes, replace_codes
from illume_lightning.nn.diffusion_decoder import SCALE, DiffusionDecoder, load_decoder, sampling_scheduler
from illume_lightning.nn.dualvitok import DualCodes, DualViTok
from illume_lightning.resolution import PIXEL_STRIDE, grids


@dataclass(frozen=True)
class Sampling:
    """How pictures are sampled."""

    num_steps: int = 50
    """Forward passes of the UNet (official release: 50, in its demos 20)."""

    guidance: float = 2.0
    """Classifier-free guidance; up to 1 there is none (official release: 2.0)."""

    scheduler: str = "diffusers.DDIMScheduler"
    """Class path of any of diffusers' schedulers; betas and prediction type are training's."""

    options: dict[str, Any] | None = None
    """Options of that scheduler, such as ``{timestep_spacing: trailing}``."""


def default_optimizer(parameters: Any) -> torch.optim.Optimizer:
    """The paper's optimizer: AdamW without weight decay at a constant 2e-5 (Table 1, 4.1)."""
    return torch.optim.AdamW(parameters, lr=2e-5, weight_decay=0.0)


class DiffusionDecoderModule(TrainingModule):
    """Trains the UNet; tokenizer and latents are frozen.

    Batches are pictures at the output's size, of which the tokenizer sees half, or codes and latents made
    before (``illume prepare latents``).

    Args:
        decoder: UNet, latents and the noise of training.
        tokenizer: folder of a DualViTok run, one of its checkpoints, or a published file.
        noise: wrong codes and missing branches in training.
        optimizer: of the UNet.
        lr_scheduler: stepped once per training step; ``None`` is the paper's constant rate.
        gradient_clip: largest gradient norm; 0 turns clipping off. The paper names none.
        sampling: of validation and prediction.
        wrong_tokens: share of codes replaced in the second half of validation, which measures robustness.
        perceptual: LPIPS network for validation.
        fid_features: feature network of the Frechet distance in validation.
        checkpoint_activations: compute the activations of the UNet's blocks again in the backward pass instead of
            keeping them.
        channels_last: memory order of UNet and VAE; not for NPUs, nor with FSDP2.
        compile: compile the UNet, in training and sampling; not for NPUs. Kernels are made for the first size, and
            when batch or picture sizes change once more, for all sizes.
    """

    def __init__(
        self,
        decoder: DiffusionDecoder,
        tokenizer: str,
        noise: ConditionNoise = ConditionNoise(),
        optimizer: OptimizerCallable = default_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        gradient_clip: float = 1.0,
        sampling: Sampling = Sampling(),
        wrong_tokens: float = 0.1,
        perceptual: nn.Module | None = None,
        fid_features: nn.Module | None = None,
        checkpoint_activations: bool = False,
        channels_last: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__(gradient_clip)
        self.model = decoder
        self.tokenizer_path = tokenizer
        self.noise = noise
        self.sampling, self.wrong_tokens = sampling, wrong_tokens
        self._optimizer, self._lr_scheduler = optimizer, lr_scheduler
        if perceptual is not None:
            self.fixed["perceptual"] = perceptual
        self._fid_features = fid_features
        self._metrics: dict[str, PictureMetrics] = {}
        self.fingerprint = ""
        if checkpoint_activations:
            decoder.unet.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False))
        if channels_last:
            use_channels_last(decoder)
        if compile:
            decoder.unet.compile()

    # -- parts -----------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> DualViTok:
        """The frozen tokenizer."""
        return cast(DualViTok, self.fixed["tokenizer"])

    def setup(self, stage: str) -> None:
        """Load the tokenizer.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if its codes are not those that the decoder takes.
        """
        if "tokenizer" in self.fixed:
            return
        tokenizer = load_tokenizer(self.tokenizer_path)
        channels = sum(quantizer.dim for quantizer in tokenizer.quantizers.values())
        if channels != self.model.condition_channels:
            raise ValueError(
                f"the tokenizer {self.tokenizer_path} has {channels} channels of codes, the UNet takes "
                f"{self.model.condition_channels}: set the UNet's condition_channels to {channels}."
            )
        self.fixed["tokenizer"] = tokenizer
        self.fingerprint = fingerprint(tokenizer)

    def configure_model(self) -> None:
        """Share the UNet out over devices, where the strategy is FSDP2."""
        unet = self.model.unet
        shard(self, unet, [*unet.down_blocks, unet.mid_block, *unet.up_blocks])

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[Any]]:
        """The UNet's optimizer, and its schedule where there is one."""
        optimizer = follow_weights(self._optimizer(self.model.unet.parameters()))
        return [optimizer], [] if self._lr_scheduler is None else [self._lr_scheduler(optimizer)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember the tokenizer."""
        checkpoint["tokenizer_fingerprint"] = self.fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model or tokenizer.

        Raises:
            ValueError: says which.
        """
        super().on_load_checkpoint(checkpoint)
        found = checkpoint.get("tokenizer_fingerprint", self.fingerprint)
        if found != self.fingerprint:
            raise ValueError(
                f"{self.trainer.ckpt_path} was trained with another tokenizer (fingerprint {found[:12]}) than "
                f"{self.tokenizer_path} ({self.fingerprint[:12]}); codes of the two mean different things: "
                "give model.tokenizer the one it was trained with, or train the decoder again."
            )

    # -- training --------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Refuse cached codes of another tokenizer.

        Raises:
            ValueError: names both.
        """
        super().on_fit_start()
        maker = getattr(self.trainer.datamodule, "tokenizer_fingerprint", None)
        if maker is not None:
            check_cached_codes(maker, self.fingerprint, self.tokenizer_path, "illume prepare latents")

    def training_step(self, batch: ImageBatch | LatentBatch, batch_idx: int) -> None:
        """One micro-batch of the denoising loss."""
        if self.leaves_out():
            return
        with torch.no_grad():
            codes, latents = self._codes_and_latents(batch)
            self.require_finite({"latents": latents}, batch)
            draws = self.draws(batch)
            codes = self.noise.replace(codes, self.tokenizer, draws)
            features = self.noise.drop(self.tokenizer.code_features(codes), self.tokenizer, draws)
        loss = self.model.loss(latents, features, draws).mean()
        self.require_finite({"loss": loss}, batch)
        self.log_means({"train/loss": loss}, on_bar=("train/loss",))
        self.descend(loss)

    def _codes_and_latents(self, batch: ImageBatch | LatentBatch) -> tuple[DualCodes, Tensor]:
        if isinstance(batch, LatentBatch):
            return DualCodes(batch.semantic, batch.pixel), batch.latents.float()
        images = to_float(batch.images)
        return self.encode(images), self.model.latents.encode(images)

    # -- use -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, images: Tensor) -> DualCodes:
        """Codes of pictures (B, 3, H, W) in [-1, 1], from half their size."""
        return encode_at_half_size(images, self.tokenizer)

    @torch.no_grad()
    def decode(self, codes: DualCodes, seeds: Sequence[int] | None = None) -> Tensor:
        """Sample pictures (B, 3, H, W) in [-1, 1] of twice the size that the codes stand for.

        Args:
            codes: ids of both branches.
            seeds: (B,) of the noise.

        Raises:
            ValueError: if the two grids don't belong together, or the decoder has no such size.
        """
        if codes.pixel is not None:
            height, width = (side * PIXEL_STRIDE for side in codes.pixel.shape[-2:])
            check_codes({"semantic": codes.semantic, "pixel": codes.pixel}, grids(height, width)._asdict())
        settings = self.sampling
        scheduler = sampling_scheduler(settings.scheduler, self.model.scheduler, settings.options)
        features = self.tokenizer.code_features(codes)
        return self.model.sample(features, scheduler, settings.num_steps, settings.guidance, seeds)

    # -- evaluation ------------------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """New metrics: both decoders, on the codes and on codes of which some are wrong."""
        super().on_validation_start()
        suffixes = ["", f"-wrong{self.wrong_tokens:.0%}".rstrip("%")] if self.wrong_tokens else [""]
        self._metrics = {
            f"{name}-{decoder}{suffix}": PictureMetrics(self._distances(), self._fid_features).to(self.device)
            for name in self.trainer.datamodule.val_names
            for suffix in suffixes
            for decoder in ("diffusion", "dualvitok")
        }

    def _distances(self) -> dict[str, Distance]:
        distances: dict[str, Distance] = {}
        if "perceptual" in self.fixed:
            distances["lpips"] = self.fixed["perceptual"]
        if self.tokenizer.semantic_encoder is not None:
            distances["tower_distance"] = partial(tower_distance, self.tokenizer.semantic_encoder)
        return distances

    def validation_step(
        self, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        """Decode a batch's codes with both decoders; returns pictures (B, 3, H, W) in [-1, 1] by name."""
        images = to_float(batch.images)
        codes = self.encode(images)
        name = self.trainer.datamodule.val_names[dataloader_idx]
        seeds = batch.sample_number.tolist()
        shown: dict[str, Tensor] = {}
        sets = [("", codes)]
        if self.wrong_tokens:
            generator = torch.Generator().manual_seed(batch_idx)
            wrong = replace_codes(codes, self.tokenizer, self.wrong_tokens, generator)
            sets.append((f"-wrong{self.wrong_tokens:.0%}".rstrip("%"), wrong))
        for suffix, given in sets:
            decoded = {
                "dualvitok": enlarge(self.tokenizer.decode_codes(given).float()),
                "diffusion": self.decode(given, seeds),
            }
            for decoder, pictures in decoded.items():
                self._metrics[f"{name}-{decoder}{suffix}"].update(images, pictures)
                shown[decoder + suffix] = pictures
        return shown

    def on_validation_epoch_end(self) -> None:
        """Log ``val/<size>-<decoder>/<metric>``."""
        for number, (name, metrics) in enumerate(self._metrics.items()):
            for metric, value in metrics.compute().items():
                on_bar = metric == "psnr" and number == 0
                self.log(f"val/{name}/{metric}", value, prog_bar=on_bar, rank_zero_only=False)

    on_test_start = on_validation_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Pictures through codes, uint8: ``dualvitok`` (B, 3, H/2, W/2) and ``diffusion`` (B, 3, H, W)."""
        codes = self.encode(to_float(batch.images))
        return {
            "dualvitok": to_uint8(self.tokenizer.decode_codes(codes)),
            "diffusion": to_uint8(self.decode(codes, batch.sample_number.tolist())),
        }


def load_diffusion_decoder(path: str | Path, tokenizer: DualViTok) -> DiffusionDecoderModule:
    """Build and fill a diffusion decoder, frozen and in evaluation mode.

    Args:
        path: folder of a run, one of its checkpoints, or a published diffusers folder.
        tokenizer: whose codes it decodes.

    Raises:
        FileNotFoundError: if there is no such run or folder.
        ValueError: if it was trained with another tokenizer, or the weights don't fit.
    """
    path = Path(path)
    if (path / "unet").is_dir():
        module = DiffusionDecoderModule(load_decoder(str(path)), tokenizer="")
    else:
        run = SavedRun(path)
        decoder = run.fill(run.build(DiffusionDecoder, "model", "init_args", "decoder"))
        sampling = Sampling(**(run.section("model", "init_args", "sampling") or {}))
        module = DiffusionDecoderModule(decoder, tokenizer="", sampling=sampling)
        check_maker(run.checkpoint, tokenizer)
    module.fixed["tokenizer"] = tokenizer
    return module.requires_grad_(False).eval()


def encode_at_half_size(images: Tensor, tokenizer: DualViTok) -> DualCodes:
    """Codes of pictures (B, 3, H, W) in [-1, 1], from half their size (bicubic, antialiased).

    Raises:
        ValueError: if half a side is no multiple of 16.
    """
    height, width = images.shape[-2:]
    step = PIXEL_STRIDE * SCALE
    if height % step or width % step:
        raise ValueError(
            f"pictures of {height} x {width} (height x width): the diffusion decoder makes sizes that are "
            f"multiples of {step} pixels; set size_step: {step} in the phases, and val_sizes to such multiples"
        )
    size = (height // SCALE, width // SCALE)
    half = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)
    return tokenizer.encode(half.clamp(-1, 1)).codes


def enlarge(pictures: Tensor) -> Tensor:
    """Twice the size, bicubic: what the diffusion decoder is compared with. (B, 3, H, W) in [-1, 1]."""
    return F.interpolate(pictures, scale_factor=SCALE, mode="bicubic", align_corners=False).clamp(-1, 1)
