"""Every shipped YAML parses against real signatures; the paper's builds at full size; ablations step."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from experiment import EXPERIMENTS, build_model, parse

from callbacks import ResolutionCurriculum
from illume_lightning.data.plan import Phase
from illume_lightning.lit.datamodule import ImageDataModule, Source

RUNS = [
    *sorted(
        str(path.relative_to(EXPERIMENTS))
        for world in ("paper", "shapes", "emoji")
        for path in (EXPERIMENTS / world).glob("*.yaml")
        if not path.name.startswith("schedule")  # a list of steps, not a run
    ),
]
HARDWARE = sorted(str(path.relative_to(EXPERIMENTS)) for path in (EXPERIMENTS / "hardware").glob("*.yaml"))
ABLATIONS = sorted(
    str(path.relative_to(EXPERIMENTS)) for path in (EXPERIMENTS / "ablations").glob("table*/*.yaml")
)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("hardware", ["", *HARDWARE])
def test_every_run_parses_with_every_hardware(run: str, hardware: str) -> None:
    config = parse(run, *([hardware] if hardware else []))
    assert config["curriculum"]["phases"][-1]["until_step"] == config["trainer"]["max_steps"]
    assert config["trainer"]["default_root_dir"].endswith("/seed0")
    for logger in config["trainer"]["logger"]:
        assert logger["init_args"]["save_dir"] == config["trainer"]["default_root_dir"]
    if hardware:
        name = Path(hardware).stem
        assert config["trainer"]["accelerator"] == name


@pytest.mark.parametrize(
    ("claim", "task"), [("pixel_first", "generation"), ("discrete_input", "understanding")]
)
def test_a_claim_is_switched_off_and_nothing_else(claim: str, task: str) -> None:
    base = ("shapes/mllm_stage2.yaml", f"ablations/claims/{task}.yaml")
    plain, config = parse(*base), parse(*base, f"ablations/claims/{claim}.yaml")
    for name, found in ((task, plain), (claim, config)):
        folder = f"runs/ablations/claims/{name}/seed0"
        assert found["trainer"]["default_root_dir"] == folder
        assert found["trainer"]["callbacks"][-2]["init_args"]["dirpath"] == f"{folder}/checkpoints"
        assert found["curriculum"]["phases"][-1]["until_step"] == found["trainer"]["max_steps"]
    assert set(plain["data"]["init_args"]["train"]) == {task}
    mllm = config["model"]["init_args"]["mllm"]["init_args"]
    options = mllm["vocabulary"] if claim == "pixel_first" else mllm
    assert options[claim] is True
    options[claim] = False
    assert all(config[section] == plain[section] for section in ("model", "data", "curriculum"))


@pytest.mark.parametrize("stage", [2, 3])
def test_the_full_setting_is_the_quick_one_for_longer(stage: int) -> None:
    run = f"shapes/mllm_stage{stage}.yaml"
    quick, full = parse(run), parse(run, f"shapes/full/mllm_stage{stage}.yaml")
    assert full["trainer"]["default_root_dir"] == f"runs/shapes-full/mllm_stage{stage}/seed0"
    steps = full["trainer"]["max_steps"]
    assert steps > quick["trainer"]["max_steps"]
    assert full["curriculum"]["phases"][-1]["until_step"] == steps
    assert full["model"]["init_args"]["lr_scheduler"]["init_args"]["T_max"] == steps
    rates = ("lr_scheduler", *(("learning_rates", "matrix_optimizer") if stage == 3 else ()))
    for section in (quick, full):
        for name in rates:
            section["model"]["init_args"].pop(name)
    assert full["model"] == quick["model"]
    held_out = ("val", "test")
    assert all(full["data"]["init_args"][part] == quick["data"]["init_args"][part] for part in held_out)


def test_the_noise_is_switched_off_and_nothing_else() -> None:
    base = ("shapes/dualvitok.yaml", "ablations/claims/tokenizer.yaml")
    plain, config = parse(*base), parse(*base, "ablations/claims/no_noise.yaml")
    assert plain["trainer"]["default_root_dir"] == "runs/ablations/claims/tokenizer/seed0"
    assert config["trainer"]["default_root_dir"] == "runs/ablations/claims/no_noise/seed0"
    noise = config["model"]["init_args"]["model"]["init_args"]["noise"]["init_args"]
    assert noise["kind"] == "none"
    noise["kind"] = "random"
    assert all(config[section] == plain[section] for section in ("model", "data", "curriculum"))


def test_the_seed_reaches_data_and_folder() -> None:
    config = parse("shapes/dualvitok.yaml", flags=("--seed_everything=5",))
    assert config["data"]["init_args"]["seed"] == 5
    assert config["trainer"]["default_root_dir"].endswith("seed5")
    assert "seed5" in config["trainer"]["callbacks"][0]["init_args"]["checkpoint"]


def test_no_yaml_includes_another() -> None:
    """An included section is dropped as soon as it has a sibling key; runs are composed on the command line."""
    for path in EXPERIMENTS.rglob("*.yaml"):
        assert "\nconfig:" not in "\n" + path.read_text(), path


def test_the_paper_builds_at_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("illume_lightning.nn.losses._find_backbone", lambda path: Path("none"))
    monkeypatch.setattr("illume_lightning.nn.losses._lpips", lambda path: torch.nn.Identity())
    module = build_model(parse("paper/dualvitok.yaml"))
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in module.model.named_children()}
    assert sizes["pixel_decoder"] == 476_363_523
    assert sizes["pixel_encoder"] == 27_159_264
    assert sizes["semantic_decoder"] == 83_350_272
    trainable = sum(p.numel() for p in module.model.parameters() if p.requires_grad)
    assert trainable == 670_219_875
    assert sum(p.numel() for p in module.discriminator.parameters()) == 2_765_633


def shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """The same choices at a sixteenth of the channels."""
    init = config["model"]["init_args"]
    init["perceptual"] = None
    init["loss"]["init_args"] |= {"perceptual_weight": 0.0, "adversarial_start": 0}
    init["discriminator"]["init_args"] = {"width": 8, "num_layers": 2}
    parts = init["model"]["init_args"]
    blocks = {"num_blocks": 1, "width": 32, "num_heads": 2}
    if parts["semantic_encoder"] is not None:
        tower = parts["semantic_encoder"]["init_args"].pop("model")
        tower["init_args"] = {"depth": 1, "width": 32, "num_heads": 2, "out_features": 48}
        parts["semantic_encoder"]["init_args"] |= {**blocks, "model": tower}
        parts["semantic_decoder"]["init_args"] |= {**blocks, "out_features": 48}
    for name in ("pixel_encoder", "pixel_decoder"):
        if parts[name] is not None:
            channels = parts[name]["init_args"]["channels"] // 16
            parts[name]["init_args"] |= {"channels": channels, "num_res_blocks": 1, "norm_groups": 8}
            parts[name]["init_args"]["multipliers"] = [1, 1, 2, 2, 4]
            if channels * 4 % parts[name]["init_args"]["latent_channels"]:
                parts[name]["init_args"]["multipliers"] = [1, 1, 2, 2, 8]
    for name in ("semantic_quantizer", "pixel_quantizer"):
        if parts[name] is not None:
            parts[name]["init_args"]["codebook_size"] //= 256
    return config


@pytest.mark.parametrize("overlay", ABLATIONS)
def test_every_ablation_steps(overlay: str, shapes: Path) -> None:
    config = parse("paper/dualvitok.yaml", "ablations/base.yaml", overlay)
    table, row = Path(overlay).parts[1], Path(overlay).stem
    assert config["trainer"]["default_root_dir"] == f"runs/ablations/{table}/{row}/seed0"
    assert config["curriculum"]["phases"][-1]["until_step"] == 100000
    torch.manual_seed(0)
    module = build_model(shrunk(config), "cpu")
    if table == "table9":
        kind, samples, tokens = row.split("_")
        noise = module.model.noise
        assert (noise.kind, noise.sample_probability) == (kind, int(samples) / 100)
        assert noise.token_probability == int(tokens) / 100
    data = ImageDataModule(train=[Source(str(shapes / "train"))], val_sizes=[], num_workers=0)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=1,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ResolutionCurriculum([Phase(1, "fixed", 64, 2, 2)])],
    )
    before = {name: value.clone() for name, value in module.model.named_parameters() if value.requires_grad}
    trainer.fit(module, data)
    moved = [
        name
        for name, value in module.model.named_parameters()
        if name in before and not value.equal(before[name])
    ]
    assert any(name.startswith("pixel_decoder") for name in moved)
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
