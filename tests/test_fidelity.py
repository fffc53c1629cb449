"""The ledger's column *ours* is what the paper's experiment really builds."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from experiment import build_model, parse

from illume_lightning.image_layout import image_layout
from illume_lightning.lit.prompts import Defaults
from illume_lightning.lit.training import TrainingModule
from illume_lightning.nn.diffusion_decoder import SCALE, build_unet
from illume_lightning.nn.document_attention import DOCUMENTS
from illume_lightning.nn.token_sampling import SegmentSampling, TokenSampling
from illume_lightning.vocabulary import Vocabulary

ROOT = Path(__file__).parents[1]


def ledger(part: str) -> dict[str, str]:
    section = (ROOT / "docs" / "fidelity.md").read_text().split(f"## {part}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return {row[0].strip(): row[3].strip() for row in rows[2:]}


@pytest.fixture(autouse=True)
def without_lpips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("illume_lightning.nn.losses._find_backbone", lambda path: Path("none"))
    monkeypatch.setattr("illume_lightning.nn.losses._lpips", lambda path: torch.nn.Identity())


def dualvitok() -> dict[str, str]:
    """The values of the paper's experiment, read off the built module, optimizers and phases."""
    config = parse("paper/dualvitok.yaml")
    module = build_model(config)
    optimizer = module._optimizer([torch.nn.Parameter(torch.zeros(1))])
    adversary = module._discriminator_optimizer([torch.nn.Parameter(torch.zeros(1))])
    assert type(optimizer) is type(adversary)
    assert optimizer.defaults["lr"] == adversary.defaults["lr"]
    group: dict[str, Any] = optimizer.param_groups[0]
    model, loss = module.model, module.loss
    phases = config["curriculum"]["phases"]
    values = {
        "pixel loss": loss.pixel_loss,
        "foreground weight": loss.foreground_weight,
        "codebook start": "random" if module.codebook_start is None else "from data",
        "optimizer": type(optimizer).__name__,
        "learning rate": group["lr"],
        "betas": ", ".join(map(str, group["betas"])),
        "weight decay": group["weight_decay"],
        "learning-rate schedule": "constant" if module._lr_scheduler is None else "scheduled",
        "gradient clipping": module.gradient_clip,
        "global batch": ", ".join({str(phase["batch_size"]) for phase in phases}),
        "noise kind": model.noise.kind,
        "noise probabilities": f"{model.noise.sample_probability}, {model.noise.token_probability}",
        "discriminator's batch norm": "over all devices"
        if "count_over_devices" in TrainingModule.on_fit_start.__code__.co_names
        else "over each device's pictures",
        "GAN weight": loss.adversarial_weight,
        "GAN start": loss.adversarial_start,
        "adaptive GAN weight": loss.adaptive_weight,
        "perceptual weight": loss.perceptual_weight,
        "semantic encoder blocks": len(model.semantic_encoder.blocks),
        "semantic decoder blocks": len(model.semantic_decoder.blocks),
        "semantic codes": model.semantic_quantizer.codebook_size,
        "pixel codes": model.pixel_quantizer.codebook_size,
        "code dimension": ", ".join({str(quantizer.dim) for quantizer in model.quantizers.values()}),
        "encoder channels": model.pixel_encoder.conv_in.out_channels,
        "decoder channels": model.pixel_decoder.conv_out.in_channels,
        "resampling": ", ".join({model.pixel_encoder.resampling, model.pixel_decoder.resampling}),
        "quantiser commitment": ", ".join({str(q.commitment) for q in model.quantizers.values()}),
        "rotation trick": model.pixel_quantizer.rotation_trick,
    }
    for number, phase in enumerate(phases, 1):
        values[f"phase {number}"] = f"{phase['mode']} {phase['side']} until {phase['until_step']}"
    return {key: str(value) for key, value in values.items()}


def diffusion_decoder() -> dict[str, str]:
    """The same of the diffusion decoder, with SDXL's UNet built instead of downloaded."""
    config = parse("paper/diffusion_decoder.yaml")
    decoder = config["model"]["init_args"]["decoder"]["init_args"]
    assert decoder["unet"]["class_path"].endswith("sdxl_unet")
    decoder["unet"] = {"class_path": "illume_lightning.nn.diffusion_decoder.build_unet"}
    # Space-to-depth has no weights either; its channels are made to fit.
    decoder["latents"] = {
        "class_path": "illume_lightning.nn.latents.SpaceToDepth",
        "init_args": {"factor": 2},
    }
    decoder["unet"]["init_args"] = {"latent_channels": 12}
    module = build_model(config)
    with torch.device("meta"):
        unet = build_unet()
    number = sum(parameter.numel() for parameter in unet.parameters())
    group: dict[str, Any] = module._optimizer([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]
    noise, phases = module.noise, config["curriculum"]["phases"]
    (ema,) = [c for c in config["trainer"]["callbacks"] if c["class_path"].endswith("EMAWeightAveraging")]
    tokens = module.model.num_text_tokens
    values = {
        "denoiser": f"{number} parameters, {unet.config.in_channels} in, {unet.config.out_channels} out",
        "text embeddings": f"zeros, {tokens} token: equal, since zero keys and values are alike",
        "super-resolution": SCALE,
        "micro-condition": "(height, width)" if module.model.transposed_sizes else "(width, height)",
        "size order of training leftovers": "on" if module.model.transposed_sizes else "off",
        "prediction": module.model.scheduler.config.prediction_type,
        "min-SNR": module.model.min_snr_gamma,
        "wrong tokens": f"{noise.sample_probability}, {noise.token_probability}",
        "semantic drop": noise.semantic_drop,
        "pixel drop": noise.pixel_drop,
        "guidance": module.sampling.guidance,
        "sampling steps": module.sampling.num_steps,
        "learning rate": group["lr"],
        "optimizer": type(module._optimizer([torch.nn.Parameter(torch.zeros(1))])).__name__,
        "weight decay": group["weight_decay"],
        "learning-rate schedule": "constant" if module._lr_scheduler is None else "scheduled",
        "global batch": ", ".join({str(phase["batch_size"]) for phase in phases}),
        "steps": config["trainer"]["max_steps"],
        "size modes": ", ".join(f"{p['mode']} {p['side']} until {p['until_step']}" for p in phases),
        "EMA": ema["init_args"]["decay"],
        "gradient clipping": module.gradient_clip,
    }
    return {key: str(value) for key, value in values.items()}


def mllm() -> dict[str, str]:
    """The same of the three stages of the MLLM."""
    configs = {number: parse(f"paper/mllm_stage{number}.yaml") for number in (1, 2, 3)}
    stages = {number: build_model(config) for number, config in configs.items()}
    model, data = stages[3].model, configs[3]["data"]["init_args"]
    vocabulary, trunk = model.vocabulary, model.trunk.config
    optimizer = stages[1]._optimizer([{"params": [torch.nn.Parameter(torch.zeros(1))]}])
    values: dict[str, Any] = {
        "vocabulary": f"{vocabulary.size - vocabulary.num_unused} ids in {vocabulary.size} rows",
        "language model": f"{trunk.num_hidden_layers} blocks of width {trunk.hidden_size}, "
        + ("tied" if model.head.is_tied else "untied"),
        "input of pictures": "codes" if model.discrete_input else "continuous features",
        "order within pictures": order(vocabulary),
        "ViT blocks of stage 3": f"from {stages[3].vit_from_layer}",
        "optimizer": type(optimizer).__name__,
        "weight decay": optimizer.param_groups[0]["weight_decay"],
        "betas": ", ".join(map(str, optimizer.param_groups[0]["betas"])),
        "learning-rate schedule": "constant" if stages[1]._lr_scheduler is None else "scheduled",
        "gradient clipping": stages[1].gradient_clip,
        "condition dropout": data["condition_dropout"],
        "unconditional prompt": "the release's" if data["release_prompts"] else "masked",
        "size of adapted features": "as it comes" if len(model.pixel_adapter) == 3 else "normalised",
        "slot embedding": "none" if model.slot_embedding is None else "learned",
        "optimizer of the matrices": "with the others"
        if stages[3]._matrix_optimizer is None
        else "their own",
        "packed attention": "document by document"
        if model.trunk.config._attn_implementation == DOCUMENTS
        else "a mask, or FlashAttention 2",
    }
    for number, config in configs.items():
        rates = stages[number].learning_rates
        values[f"stage {number} trains"] = ", ".join(f"{name} {rate}" for name, rate in rates.items())
        values[f"stage {number} data"] = "; ".join(
            f"{phase['mode']} {phase['side']}, "
            + (f"generation {phase['generation_side']}, " if phase["generation_side"] else "")
            + f"{phase['batch_size']} until {phase['until_step']}"
            for phase in config["curriculum"]["phases"]
        )
    return {key: str(value) for key, value in values.items()}


def order(vocabulary: Vocabulary) -> str:
    """Kinds of codes as the layout has them."""
    kinds = {vocabulary.semantic_ids: "semantic", vocabulary.pixel_ids: "pixel"}
    found = dict.fromkeys(kinds[ids] for ids in image_layout((64, 64), vocabulary).allowed if ids in kinds)
    return ", then ".join(found)


def generation() -> dict[str, str]:
    """Sampling of every task, and the order in which the layout has the codes."""
    defaults = Defaults()

    def described(sampling: TokenSampling) -> str:
        segments = {"semantic": sampling.semantic, "pixel": sampling.pixel}
        texts = [f"{name} {s.temperature}, {s.top_k}, {s.top_p}" for name, s in segments.items()]
        return "; ".join([*texts, f"guidance {sampling.guidance}"])

    assert {defaults.chat.text, defaults.generate.text, defaults.edit.text} == {SegmentSampling(0.0)}
    return {
        "order of tokens": order(Vocabulary()),
        "sampling of pictures": described(defaults.generate),
        "sampling of edits": described(defaults.edit),
        "sampling of words": "greedy",
    }


PARTS = {
    "Generation": generation,
    "DualViTok": dualvitok,
    "Diffusion decoder": diffusion_decoder,
    "MLLM": mllm,
}
YAMLS = {
    "DualViTok": "paper/dualvitok.yaml",
    "Diffusion decoder": "paper/diffusion_decoder.yaml",
    "MLLM": "paper/mllm_stage3.yaml",
}

# Rows that other tests hold: test_losses (dropout, eps), test_dualvitok (branch), test_parity (target);
# test_diffusion_decoder (condition, numbers, guidance), test_diffusion_decoder_module (half size);
# test_generation_parity and test_token_sampling (formula, filters, temperature), test_grammar (tokens, text),
# test_generation (batches), test_geometry (size of an edit);
# test_parity (features), test_mllm_stages (parts, loss), test_packing (long), test_chat (typed tokens, braces).
ELSEWHERE = {
    "DualViTok": {"LPIPS dropout", "semantic loss", "noise branch", "semantic target"},
    "Diffusion decoder": {
        "condition",
        "number of a 512-area ratio",
        "unconditional branch",
        "latents",
        "half-size input of the tokenizer",
    },
    "Generation": {
        "guidance formula",
        "filters",
        "temperature 0",
        "first tokens of a picture",
        "text between pictures",
        "batches of pictures",
        "size of an edit",
    },
    "MLLM": {
        "continuous features",
        "pixel encoder of stage 3",
        "loss of a step",
        "long conversations",
        "special tokens that a user types",
        "braces in captions",
    },
}


@pytest.mark.parametrize("part", PARTS)
def test_every_row_is_checked_and_true(part: str) -> None:
    rows, built = ledger(part), PARTS[part]()
    assert set(rows) == set(built) | ELSEWHERE[part]
    assert {key: rows[key] for key in built} == built


@pytest.mark.parametrize("part", YAMLS)
def test_the_named_options_exist(part: str) -> None:
    section = (ROOT / "docs" / "fidelity.md").read_text().split(f"## {part}\n")[1].split("\n## ")[0]
    config = parse(YAMLS[part])
    init = {**config["model"]["init_args"], **config["data"]["init_args"]}
    inner = [
        value["init_args"] for value in init.values() if isinstance(value, dict) and "init_args" in value
    ]
    known = {name for section in (init, *inner) for name in section}
    for option in re.findall(r"`(\w+)(?:\.\w+)?: \S+`", section):
        assert option in known, option
