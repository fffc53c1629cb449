"""The ledger's column *ours* is what the paper's experiment really builds."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from experiment import build_model, parse

ROOT = Path(__file__).parents[1]


def ledger() -> dict[str, str]:
    section = (ROOT / "docs" / "fidelity.md").read_text().split("## DualViTok")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return {row[0].strip(): row[3].strip() for row in rows[2:]}


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The values of the paper's experiment, read off the built module, optimizers and phases."""
    monkeypatch.setattr("illume_lightning.nn.losses._find_backbone", lambda path: Path("none"))
    monkeypatch.setattr("illume_lightning.nn.losses._lpips", lambda path: torch.nn.Identity())
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
        "optimizer": type(optimizer).__name__,
        "learning rate": group["lr"],
        "betas": ", ".join(map(str, group["betas"])),
        "weight decay": group["weight_decay"],
        "learning-rate schedule": "constant" if module._lr_scheduler is None else "scheduled",
        "gradient clipping": module.gradient_clip,
        "global batch": ", ".join({str(phase["batch_size"]) for phase in phases}),
        "noise kind": model.noise.kind,
        "noise probabilities": f"{model.noise.sample_probability}, {model.noise.token_probability}",
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


# Rows that other tests hold: test_losses (dropout, eps), test_dualvitok (branch), test_parity (target).
ELSEWHERE = {"LPIPS dropout", "semantic loss", "noise branch", "semantic target"}


def test_every_row_is_checked(built: dict[str, str]) -> None:
    assert set(ledger()) == set(built) | ELSEWHERE


def test_every_row_is_true(built: dict[str, str]) -> None:
    rows = ledger()
    assert {key: rows[key] for key in built} == built


def test_the_named_options_exist() -> None:
    section = (ROOT / "docs" / "fidelity.md").read_text()
    config = yaml.safe_load((ROOT / "experiments/paper/dualvitok.yaml").read_text())
    init = config["model"]["init_args"]
    model = init["model"]["init_args"]
    known = {**init, **model}
    for option in re.findall(r"`(\w+)\.\w+: \S+`", section):
        assert option in known, option
