"""Tiny YAML files of every module, and what two of their runs have to have in common."""

import csv
import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector

from callbacks import ExactResume, exact_resume
from illume_lightning.lit.dualvitok import DualViTokModule
from illume_lightning.lit.training import TrainingModule
from illume_lightning.report.metrics import read_metrics
from illume_lightning.vocabulary import Vocabulary

STEPS = 9
SAVED_EVERY = 3
SIZES = [[64, 64], [64, 128], [128, 64], [32, 128], [128, 32], [32, 96], [96, 32]]
LIT = "illume_lightning.lit"


def section(path: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": path, "init_args": arguments}


ADAM = section("torch.optim.AdamW", lr=2e-3)
COSINE = section("torch.optim.lr_scheduler.CosineAnnealingLR", T_max=STEPS)
NOISE = section(
    "illume_lightning.nn.noise.TokenNoise", kind="random", sample_probability=0.5, token_probability=0.2
)
EMA = section("lightning.pytorch.callbacks.EMAWeightAveraging", decay=0.5)


def run(
    model: Any, data: Any, phases: list[dict[str, Any]], callbacks: tuple[Any, ...] = ()
) -> dict[str, Any]:
    """Two micro-batches in a step; logged every second step, validated and saved every third."""
    folder = "run"
    return {
        "seed_everything": 1,
        "trainer": {
            "accelerator": "cpu",
            "max_steps": STEPS,
            "max_epochs": -1,
            "default_root_dir": folder,
            "use_distributed_sampler": False,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "deterministic": True,
            "log_every_n_steps": 2,
            "val_check_interval": 6,  # micro-batches
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "logger": [section(f"{LIT}.metrics_logger.MetricsLogger", save_dir=folder, name="metrics")],
            "callbacks": [
                section("callbacks.ExactResume"),
                *callbacks,
                section("callbacks.ResultTable"),
                section(
                    "callbacks.Checkpoint",
                    dirpath=f"{folder}/checkpoints",
                    filename="{step}",
                    every_n_train_steps=SAVED_EVERY,
                    save_top_k=1,
                    save_last=True,
                ),
            ],
        },
        "curriculum": {"phases": phases},
        "data": data,
        "model": model,
    }


def phase(until: int, mode: str, side: int, batch: int = 4, micro: int = 2, **more: Any) -> dict[str, Any]:
    sizes = {"batch_size": batch, "micro_batch_size": micro}
    return {"until_step": until, "mode": mode, "side": side, **sizes, **more}


def images(world: Path, **options: Any) -> dict[str, Any]:
    stores = [
        {"path": str(world / "shapes" / name), "weight": weight}
        for name, weight in (("train", 0.7), ("val", 0.3))
    ]
    given = {"val_sizes": [32], "val_limit": 4, "val_batch_size": 2, "num_workers": 0, "horizontal_flip": 0.5}
    held_out = {"shapes": str(world / "shapes" / "val")}
    return section(f"{LIT}.datamodule.ImageDataModule", train=stores, val=held_out, **(given | options))


def vision_encoder(world: Path) -> dict[str, Any]:
    tower = section(
        "illume_lightning.nn.semantic.QwenVisionTower", depth=1, width=32, num_heads=2, out_features=48
    )
    model = section(
        f"{LIT}.vision_encoder.VisionEncoderModule",
        model=section(
            "illume_lightning.nn.text_alignment.TextAlignment", tower=tower, num_buckets=256, embed_dim=16
        ),
        optimizer=ADAM,
        lr_scheduler=COSINE,
    )
    phases = [phase(3, "any_resolution", 32), phase(STEPS, "any_resolution", 64)]
    return run(model, images(world, horizontal_flip=0.0), phases)


def dualvitok(world: Path) -> dict[str, Any]:
    """An adversary from step 2 on, codebooks from data at step 1, noise, and averaged weights."""
    loss = section(
        "illume_lightning.nn.losses.DualViTokLoss",
        perceptual_weight=0.0,
        adversarial_weight=0.5,
        adversarial_start=2,
    )
    model = section(
        f"{LIT}.dualvitok.DualViTokModule",
        model=section("tiny.build_tiny", noise=NOISE),
        loss=loss,
        discriminator=section("illume_lightning.nn.discriminator.PatchDiscriminator", width=8, num_layers=2),
        optimizer=ADAM,
        discriminator_optimizer=ADAM,
        lr_scheduler=COSINE,
        codebook_start={"steps": 1, "latent_noise": 0.1, "batches": 2},
    )
    phases = [phase(3, "fixed", 32), phase(STEPS, "any_resolution", 64)]
    return run(model, images(world), phases, (EMA, section("callbacks.ReconstructionGrid")))


def diffusion_decoder(world: Path) -> dict[str, Any]:
    unet = section(
        "illume_lightning.nn.diffusion_decoder.build_unet",
        latent_channels=48,
        condition_channels=16,
        channels=[16, 32],
        transformer_layers=[0, 1],
        head_dim=16,
        cross_attention_dim=8,
        pooled_dim=4,
        time_dim=4,
        norm_groups=4,
    )
    decoder = section(
        "illume_lightning.nn.diffusion_decoder.DiffusionDecoder",
        unet=unet,
        latents=section("illume_lightning.nn.latents.SpaceToDepth", factor=4),
        scheduler=section("diffusers.DDPMScheduler", prediction_type="v_prediction", clip_sample=False),
        sizes=SIZES,
    )
    model = section(
        f"{LIT}.diffusion_decoder.DiffusionDecoderModule",
        decoder=decoder,
        tokenizer=str(world / "dualvitok"),
        noise={"sample_probability": 0.5, "token_probability": 0.3, "semantic_drop": 0.3, "pixel_drop": 0.3},
        optimizer=ADAM,
        lr_scheduler=COSINE,
        sampling={"num_steps": 1, "guidance": 1.0},
    )
    phases = [phase(3, "fixed", 64, size_step=32), phase(STEPS, "multi_ratio", 64, size_step=32)]
    return run(model, images(world, val_sizes=[64], val_limit=2), phases, (EMA,))


def mllm(world: Path, stage: int, vocabulary: Vocabulary) -> dict[str, Any]:
    """Packed rows of a mixture in which users' texts are left out at random; Muon in stage 2, dropout in stage 3."""
    tasks = {"text": 0.3, "generation": 0.4, "editing": 0.3}
    options: dict[str, Any] = {}
    if stage == 2:
        options = {"matrix_optimizer": section("torch.optim.Muon", lr=1e-3)}
    if stage == 3:
        options = {"vit_from_layer": 0, "lora": {"rank": 4, "alpha": 8, "dropout": 0.5}}
    parts = {1: ("adapters", "vision_tables"), 2: ("adapters", "llm"), 3: ("adapters", "llm", "vision_tower")}
    model = section(
        f"{LIT}.mllm.MLLMStage{stage}",
        mllm=section("tiny_mllm.build_mllm", vocabulary=asdict(vocabulary), slot_grid=4),
        tokenizer=str(world / "dualvitok"),
        learning_rates=dict.fromkeys(parts[stage], 2e-3),
        optimizer=ADAM,
        lr_scheduler=COSINE,
        **options,
    )
    data = section(
        f"{LIT}.conversation_data.ConversationDataModule",
        text_tokenizer=str(world / "text_tokenizer"),
        train={
            task: {"path": str(world / task / "train"), "weight": weight} for task, weight in tasks.items()
        },
        val={task: {"path": str(world / task / "val")} for task in ("text", "generation")},
        row_tokens=256,
        condition_dropout=0.5,
        val_side=32,
        val_limit=2,
        num_workers=0,
    )
    phases = [phase(3, "fixed", 32), phase(STEPS, "any_resolution", 32, generation_side=32)]
    return run(model, data, phases)


def write(config: dict[str, Any], folder: Path) -> Path:
    """A folder to start a run in."""
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


# -- what came of it --


def result(folder: Path) -> dict[str, Any]:
    """Everything that a run leaves, apart from times, paths and the number of its starts."""
    root = folder / "run"
    saved = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == STEPS
    saved["callbacks"] = {k: v for k, v in saved["callbacks"].items() if not k.startswith("Checkpoint")}
    saved["loops"]["fit_loop"].pop("epoch_loop.val_loop.batch_progress")
    saved["logs"].pop("version")
    for name in [name for name in saved["logs"]["row"] or {} if name.startswith("speed/")]:
        del saved["logs"]["row"][name]
    for loop in ("validate_loop", "test_loop", "predict_loop"):
        saved["loops"].pop(loop)
    series = read_metrics(root).series
    pictures = {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((root / "pictures").rglob("*.png"))
    }
    return {
        "checkpoint": saved,
        "metrics": {name: points for name, points in series.items() if not name.startswith("speed/")},
        "last table": table(root),
        "pictures": pictures,
        "results.md": (root / "results.md").read_text(),
    }


def table(root: Path) -> dict[str, dict[str, str]]:
    """The last table's metrics by name and step, as they are written; a start with nothing left to do has none."""
    last = max((root / "metrics").glob("version_*/metrics.csv"), key=lambda path: int(path.parent.name[8:]))
    found: dict[str, dict[str, str]] = {}
    with last.open(newline="") as stream:
        for row in csv.DictReader(stream):
            for name, cell in row.items():
                if cell and not name.startswith("speed/"):
                    found.setdefault(name, {})[row["step"]] = cell
    return found


def differences(found: Any, expected: Any, name: str = "") -> list[str]:
    """Names of what is not equal bit for bit."""
    if isinstance(expected, torch.Tensor):
        same = isinstance(found, torch.Tensor) and found.dtype == expected.dtype and found.equal(expected)
        return [] if same else [name]
    if isinstance(expected, dict) and isinstance(found, dict):
        missing = [f"{name}/{key}" for key in expected.keys() ^ found.keys()]
        both = expected.keys() & found.keys()
        return missing + [
            line for key in both for line in differences(found[key], expected[key], f"{name}/{key}")
        ]
    if isinstance(expected, list | tuple) and isinstance(found, list | tuple) and len(found) == len(expected):
        pairs = enumerate(zip(found, expected, strict=True))
        return [line for number, (f, e) in pairs for line in differences(f, e, f"{name}/{number}")]
    return [] if found == expected else [name]


# -- what would go wrong --


def generators_are_left() -> None:
    """As they are after a start."""
    exact_resume._restore = lambda *given: None


def debts_are_left() -> None:
    """Neither rows nor validations are made good."""
    ExactResume._go_on = lambda *given: None  # type: ignore[method-assign]


def optimizers_begin_anew() -> None:
    """Without their moments."""
    _CheckpointConnector.restore_optimizers = lambda connector: None  # type: ignore[method-assign]


def averages_begin_anew() -> None:
    """From the average's own weights."""
    WeightAveraging.on_load_checkpoint = lambda *given: None  # type: ignore[method-assign]


def counts_begin_anew() -> None:
    """Of codes, since the last validation."""
    DualViTokModule.on_load_checkpoint = TrainingModule.on_load_checkpoint  # type: ignore[method-assign]
