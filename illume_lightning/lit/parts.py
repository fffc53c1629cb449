"""Parts of a trained model, from wherever they lie: a run's MLLM, a published one, what makes pictures of codes."""

import json
from pathlib import Path
from typing import Any

import torch

from illume_lightning.lit.diffusion_decoder import DiffusionDecoderModule, load_diffusion_decoder
from illume_lightning.lit.lora import LoRA
from illume_lightning.lit.mllm import MLLMStage3
from illume_lightning.lit.saved_run import SavedRun
from illume_lightning.lit.tokenizer import fingerprint, load_tokenizer
from illume_lightning.nn.dualvitok import DualViTok
from illume_lightning.nn.mllm import MLLM
from illume_lightning.nn.mllm_checkpoints import read_mllm
from illume_lightning.nn.pixel import PixelEncoder
from illume_lightning.nn.semantic import QwenVisionTower
from illume_lightning.resolution import ratio_sizes

SETTINGS = "illume_lightning"
"""Our section of a published folder's ``config.json``; the official release's has none."""

RELEASE_SETTINGS = {"sizes": ratio_sizes(512, 64), "max_side": 768, "release_prompts": True}
"""What the official release's MLLM was trained with: 11 sizes near 512, pictures of up to 768 x 768 pixels to
look at, and its own unconditional prompts."""


def load_run(run: SavedRun) -> MLLM:
    """The language model of a run, with its weights, frozen and in evaluation mode; with low-rank matrices, if any.

    Raises:
        ValueError: if it is no run of an MLLM stage, or the weights don't fit.
    """
    mllm = run.build(MLLM, "model", "init_args", "mllm")
    if (lora := run.section("model", "init_args", "lora")) is not None:
        MLLMStage3(mllm, 0, LoRA(**lora)).configure_model()
    return run.fill(mllm).requires_grad_(False).eval()


def load_published(
    folder: str | Path,
    tokenizer: DualViTok | None,
    towers: tuple[QwenVisionTower, PixelEncoder] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[MLLM, dict[str, Any]]:
    """A published MLLM on its device, frozen, and the options of ``Illume`` that it was trained with.

    Args:
        folder: as ``read_mllm``.
        tokenizer: whose codes it reads and writes.
        towers: as ``read_mllm``; by default the tokenizer's, without one full-size.
        device: of the weights.
        dtype: of the weights.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the weights don't fit, or the tokenizer is another one than the model was trained with.
    """
    if towers is None and tokenizer is not None and tokenizer.semantic_encoder and tokenizer.pixel_encoder:
        towers = tokenizer.semantic_encoder.model, tokenizer.pixel_encoder
    semantic, pixel = towers or (None, None)
    mllm = read_mllm(folder, semantic, pixel, device=device, dtype=dtype).requires_grad_(False).eval()
    settings = json.loads((Path(folder) / "config.json").read_text()).get(SETTINGS, RELEASE_SETTINGS)
    if tokenizer is not None:
        _check_codes(mllm, tokenizer, settings.get("tokenizer_fingerprint"), folder)
    sizes = [(height, width) for height, width in settings["sizes"]]
    return mllm, {name: settings[name] for name in ("max_side", "release_prompts")} | {"sizes": sizes}


def load_decoders(
    tokenizer: str | Path | None, diffusion_decoder: str | Path | None, device: torch.device
) -> tuple[DualViTok | None, DiffusionDecoderModule | None]:
    """What makes pictures of codes.

    Raises:
        ValueError: if a diffusion decoder comes without its tokenizer.
    """
    if tokenizer is None:
        if diffusion_decoder is not None:
            raise ValueError("a diffusion decoder needs its tokenizer: give that too")
        return None, None
    loaded = load_tokenizer(tokenizer).to(device)
    if diffusion_decoder is None:
        return loaded, None
    return loaded, load_diffusion_decoder(diffusion_decoder, loaded).to(device)


def _check_codes(mllm: MLLM, tokenizer: DualViTok, maker: str | None, folder: str | Path) -> None:
    wanted = {"semantic": mllm.vocabulary.semantic_codes, "pixel": mllm.vocabulary.pixel_codes}
    found = {name: quantizer.codebook_size for name, quantizer in tokenizer.quantizers.items()}
    if found != wanted:
        raise ValueError(
            f"the tokenizer has codebooks of {found} codes, the vocabulary of {folder} has {wanted}: give the one that "
            "the model was trained with"
        )
    if maker not in (None, own := fingerprint(tokenizer)):
        raise ValueError(
            f"{folder} was trained on codes of another tokenizer (fingerprint {maker[:12]}) than the one given "
            f"({own[:12]}): give the one it was trained with"
        )
