"""Training and evaluation of DualViTok (paper 3.1, 3.4, Table 1)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from illume_lightning.lit.codebook_usage import CodebookUsage
from illume_lightning.lit.datamodule import ImageBatch
from illume_lightning.lit.memory_layout import follow_weights, use_channels_last
from illume_lightning.lit.reconstruction_metrics import ReconstructionMetrics
from illume_lightning.lit.training import TrainingModule
from illume_lightning.nn.discriminator import PatchDiscriminator
from illume_lightning.nn.dualvitok import DualViTok, DualViTokOutput
from illume_lightning.nn.losses import DualViTokLoss, Perceptual
from illume_lightning.nn.pixel import ResBlock
from illume_lightning.nn.recompute import recompute
from illume_lightning.nn.semantic import VisionBlock


@dataclass
class CodebookStart:
    """A start for worlds too small to fill a codebook from nothing; the paper's configs don't use it."""

    steps: int
    """Training steps as a plain autoencoder, before anything is quantised."""

    latent_noise: float = 0.1
    """Standard deviation of the noise on the latents in these steps."""

    batches: int = 32
    """Training batches whose latents the codebooks start from (k-means)."""


def default_optimizer(parameters: Any) -> torch.optim.Optimizer:
    """The paper's optimizer: AdamW without weight decay at a constant 1e-4 (paper 4.1; betas: release)."""
    return torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0)


class DualViTokModule(TrainingModule):
    """One generator and one discriminator step per training step, by manual optimisation.

    Args:
        model: the tokenizer.
        loss: the generator's and discriminator's loss with their weights.
        perceptual: LPIPS network; ``None`` trains without the perceptual loss.
        discriminator: PatchGAN; ``None`` trains without the GAN loss.
        optimizer: of the tokenizer's trainable parameters.
        discriminator_optimizer: of the discriminator.
        lr_scheduler: stepped once per training step for each optimizer; ``None`` is the paper's constant rate.
        gradient_clip: largest gradient norm, for each of the two (official release: 1.0); 0 turns it off.
        codebook_start: warm-up and data-dependent codebooks for small worlds.
        fid_features: feature network of the Frechet distance in validation; ``None`` leaves it out. Only the
            Inception network of torch-fidelity makes it an rFID.
        checkpoint_activations: compute the activations of residual and transformer blocks again in the backward pass
            instead of keeping them.
        channels_last: memory order of pixel encoder, pixel decoder and discriminator; not for NPUs.
        compile: compile pixel encoder and pixel decoder, where nearly all the work is; not for NPUs. Vision tower,
            quantisers and noise have steps that hang on values, and stay as they are. Kernels are made for the first
            size, and when batch or picture sizes change once more, for all sizes: the curriculum makes no more than
            three. Validation has its own.

    Raises:
        ValueError: if a loss is given without its network or a network without its loss, or ``compile`` and
            ``loss.adaptive_weight`` together.
    """

    def __init__(
        self,
        model: DualViTok,
        loss: DualViTokLoss,
        perceptual: Perceptual | None = None,
        discriminator: PatchDiscriminator | None = None,
        optimizer: OptimizerCallable = default_optimizer,
        discriminator_optimizer: OptimizerCallable = default_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        gradient_clip: float = 1.0,
        codebook_start: CodebookStart | None = None,
        fid_features: nn.Module | None = None,
        checkpoint_activations: bool = False,
        channels_last: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__(gradient_clip)
        if (perceptual is None) != (loss.perceptual_weight == 0):
            raise ValueError(
                f"loss.perceptual_weight is {loss.perceptual_weight} and perceptual is "
                f"{'missing' if perceptual is None else 'given'}: give both, or set the weight to 0 and leave "
                "perceptual out."
            )
        if (discriminator is None) != (loss.adversarial_weight == 0):
            raise ValueError(
                f"loss.adversarial_weight is {loss.adversarial_weight} and discriminator is "
                f"{'missing' if discriminator is None else 'given'}: give both, or set the weight to 0 and "
                "leave discriminator out."
            )
        if compile and loss.adaptive_weight:
            raise ValueError(
                "loss.adaptive_weight asks for gradients within the pixel decoder, which a compiled one has not: turn "
                "it or compile off"
            )
        self.model = model
        self.loss = loss
        self.discriminator = discriminator
        if perceptual is not None:
            self.fixed["perceptual"] = perceptual
        self._metrics: dict[str, ReconstructionMetrics] = {}
        self._fid_features = fid_features
        self._usage: dict[str, CodebookUsage] = {}
        self._counts: dict[str, Tensor] = {}
        self._optimizer, self._discriminator_optimizer = optimizer, discriminator_optimizer
        self._lr_scheduler = lr_scheduler
        self.codebook_start = codebook_start
        if checkpoint_activations:
            recompute(block for block in model.modules() if isinstance(block, ResBlock | VisionBlock))
        for network in (model.pixel_encoder, model.pixel_decoder, discriminator):
            if network is None:
                continue
            if channels_last:
                use_channels_last(network)
            if compile and network is not discriminator:
                network.compile()

    # -- optimizers ------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[Any]]:
        """The tokenizer's optimizer, the discriminator's where there is one, and a schedule for each."""
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        optimizers = [self._optimizer(trainable)]
        if self.discriminator is not None:
            optimizers.append(self._discriminator_optimizer(self.discriminator.parameters()))
        for optimizer in optimizers:
            follow_weights(optimizer)
        if self._lr_scheduler is None:
            return optimizers, []
        return optimizers, [self._lr_scheduler(optimizer) for optimizer in optimizers]

    def gradient_norm_name(self, optimizer: torch.optim.Optimizer) -> str:
        """The two networks' norms apart."""
        is_discriminator = optimizer is not self.all_optimizers()[0].optimizer
        return "discriminator_grad_norm" if is_discriminator else "generator_grad_norm"

    # -- training --------------------------------------------------------------------------------------------

    @property
    def codebook_usage(self) -> dict[str, CodebookUsage]:
        """By branch, what training has used on this device since the last validation."""
        return self._usage

    def on_fit_start(self) -> None:
        """Start counting codes."""
        super().on_fit_start()
        self._usage = {
            name: CodebookUsage(quantizer.codebook_size).to(self.device)
            for name, quantizer in self.model.quantizers.items()
        }
        if self.trainer.is_global_zero:
            for name, counts in self._counts.items():
                self._usage[name].go_on(counts.to(self.device))
        self._counts = {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember the codes counted since the last validation, by all devices."""
        checkpoint["code_counts"] = {
            name: self.trainer.strategy.reduce(usage.counts.clone(), reduce_op="sum")
            for name, usage in self._usage.items()
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting codes."""
        super().on_load_checkpoint(checkpoint)
        self._counts = checkpoint.get("code_counts", {})

    def on_train_batch_start(self, batch: ImageBatch, batch_idx: int) -> None:
        """Start the codebooks from data at the end of the warm-up."""
        start = self.codebook_start
        if start is not None and self.global_step == start.steps and self.micro_batch == 0:
            self._start_codebooks(start)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """One micro-batch; the optimizers step at the last one of a training step."""
        if self.leaves_out():
            return
        images = to_float(batch.images)
        optimizers = self.all_optimizers()
        output = self.model(images, self._latent_noise(), self.draws(batch))
        self.require_finite({"reconstruction": output.reconstruction}, batch)
        adversarial = self.discriminator is not None and self.loss.is_adversarial(self.global_step)
        with _frozen(self.discriminator):
            logits = None
            if self.discriminator is not None and adversarial:
                logits = self.discriminator(output.reconstruction)
            terms = self.loss.generator(
                images,
                output,
                perceptual=self.fixed.get("perceptual"),
                fake_logits=logits,
                last_layer=self.model.pixel_decoder.last_layer,
                average=self.average,
            )
        loss, idle = terms["loss"], self._idle_parameters(adversarial)
        if self.discriminator is not None and adversarial:
            fake = output.reconstruction.detach()
            terms |= self.loss.discriminator(self.discriminator(images), self.discriminator(fake))
            # Neither reaches the other's parameters; one backward pass of both is one exchange between devices.
            loss = loss + terms["discriminator_loss"]
        self.require_finite(terms, batch)
        self._log_training(terms, output)
        self.backward_micro_batch(loss, idle)
        if self.is_last_micro_batch:
            self.step_optimizers(optimizers if adversarial else optimizers[:1])
            self.step_schedules()

    def regime(self, step: int) -> list[bool]:
        """Whether codes are used, and whether there is an adversary."""
        start = self.codebook_start
        return [start is None or step >= start.steps, self.loss.is_adversarial(step)]

    def _idle_parameters(self, adversarial: bool) -> list[nn.Parameter]:
        """Trained parameters that have no part in this step's losses."""
        idle: list[nn.Module] = []
        if self.discriminator is not None and not adversarial:
            idle.append(self.discriminator)
        if self._latent_noise() is not None:
            idle.extend(self.model.quantizers.values())
        return [parameter for module in idle for parameter in module.parameters() if parameter.requires_grad]

    def _latent_noise(self) -> float | None:
        start = self.codebook_start
        return start.latent_noise if start is not None and self.global_step < start.steps else None

    @torch.no_grad()
    def _start_codebooks(self, start: CodebookStart) -> None:
        self.model.eval()
        gathered: dict[str, list[Tensor]] = {name: [] for name in self.model.quantizers}
        for images in self.trainer.datamodule.sample_images(start.batches):
            latents, _ = self.model.latents(to_float(images.to(self.device)))
            for name, values in gathered.items():
                # In the order that one device has them in.
                tokens = latents[name].float().permute(0, 2, 3, 1).flatten(0, 2)
                values.append(self.all_gather(tokens).flatten(0, -2))
        self.model.train()
        for name, quantizer in self.model.quantizers.items():
            quantizer.initialise_codebook(torch.cat(gathered[name]), torch.Generator().manual_seed(0))

    def _log_training(self, terms: dict[str, Tensor], output: DualViTokOutput) -> None:
        named = {f"train/{name}": value for name, value in terms.items()}
        self.log_means(named, on_bar=("train/loss", "train/pixel_loss"))
        if self._latent_noise() is None:
            codes = output.encoded.codes
            for name, usage in self._usage.items():
                usage.update(getattr(codes, name))

    # -- evaluation ------------------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """New metrics for every validation size, and the training codebooks' health since the last time."""
        super().on_validation_start()
        for name, usage in self._usage.items():
            if usage.counts.sum() > 0 and not self.trainer.sanity_checking:
                self._log_health(f"train/{name}", usage)
                usage.reset()
        self._metrics = {
            name: ReconstructionMetrics(
                {branch: q.codebook_size for branch, q in self.model.quantizers.items()},
                perceptual=self.fixed.get("perceptual"),
                fid_features=self._fid_features,
            ).to(self.device)
            for name in self.trainer.datamodule.val_names
        }

    def validation_step(self, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Reconstruct a batch; returns the reconstruction (B, 3, H, W) in [-1, 1] for the picture grids."""
        images = to_float(batch.images)
        output = self.model(images)
        reconstruction = output.reconstruction.float().clamp(-1, 1)
        name = self.trainer.datamodule.val_names[dataloader_idx]
        self._metrics[name].update(images, reconstruction, output)
        return reconstruction

    def on_validation_epoch_end(self) -> None:
        """Log every size's metrics as ``val/<size>/<metric>``."""
        for name, metrics in self._metrics.items():
            for metric, value in metrics.compute().items():
                on_bar = metric == "psnr" and name == next(iter(self._metrics))
                self.log(f"val/{name}/{metric}", value, prog_bar=on_bar, rank_zero_only=False)

    on_test_start = on_validation_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Reconstruct a batch: uint8 (B, 3, H, W)."""
        output = self.model(to_float(batch.images))
        return to_uint8(output.reconstruction)

    def _log_health(self, prefix: str, usage: CodebookUsage) -> None:
        health = usage.compute()
        for field, value in health._asdict().items():
            self.log(f"{prefix}_{field}", value.float())


def to_float(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> float in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Float (B, 3, H, W) in [-1, 1], clamped -> uint8, rounded."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


@contextmanager
def _frozen(module: nn.Module | None) -> Iterator[None]:
    """Keep the generator's backward pass out of the discriminator's gradients."""
    if module is None:
        yield
        return
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)
