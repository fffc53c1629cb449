"""Modules small enough to train in a test, whose plans are compared with what they do."""

from typing import Any

from diffusers import DDPMScheduler
from tiny import build_tiny
from tiny_mllm import build_mllm

from illume_lightning.budget.published import UntrainedPerceptual
from illume_lightning.data.schedule import Phase
from illume_lightning.lit.diffusion_decoder import DiffusionDecoderModule
from illume_lightning.lit.dualvitok import DualViTokModule
from illume_lightning.lit.lora import LoRA
from illume_lightning.lit.mllm import MLLMStage2, MLLMStage3
from illume_lightning.lit.training import TrainingModule
from illume_lightning.nn.diffusion_decoder import DiffusionDecoder, build_unet
from illume_lightning.nn.discriminator import PatchDiscriminator
from illume_lightning.nn.latents import SpaceToDepth
from illume_lightning.nn.losses import DualViTokLoss
from illume_lightning.nn.noise import TokenNoise

DATA: dict[str, Any] = {"row_tokens": 512, "train": None}


def dualvitok() -> DualViTokModule:
    return DualViTokModule(
        build_tiny(noise=TokenNoise("random", 0.5, 0.5)),
        DualViTokLoss(adversarial_start=0),
        UntrainedPerceptual(),
        PatchDiscriminator(width=16, num_layers=2),
    )


def decoder() -> DiffusionDecoderModule:
    unet = build_unet(48, 16, (32, 64), (0, 1), 16, 32, 32, 32, norm_groups=4, num_res_blocks=1)
    module = DiffusionDecoderModule(
        DiffusionDecoder(unet, SpaceToDepth(4), DDPMScheduler()), tokenizer="tiny"
    )
    module.fixed["tokenizer"] = build_tiny().requires_grad_(False).eval()
    return module


def mllm(**options: Any) -> MLLMStage2:
    module = MLLMStage2(build_mllm(width=64), tokenizer="tiny", **options)
    module.fixed["tokenizer"] = build_tiny().requires_grad_(False).eval()
    return module


def checkpointed_mllm() -> MLLMStage2:
    return mllm(checkpoint_activations=True)


def lora() -> MLLMStage3:
    module = MLLMStage3(build_mllm(width=64), 0, LoRA(4, 8), tokenizer="tiny")
    module.fixed["tokenizer"] = build_tiny().requires_grad_(False).eval()
    return module


def phase_of(module: TrainingModule) -> Phase:
    if isinstance(module, DiffusionDecoderModule):
        return Phase(2, "fixed", 64, 8, 8, size_step=32)
    return Phase(2, "fixed", 64, 4, 4)


BUILDERS = (dualvitok, decoder, mllm, checkpointed_mllm, lora)
