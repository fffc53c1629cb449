"""``illume fit`` of shipped YAML files, with models and phases small enough for a test."""

from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
STEPS = 4


def vision_encoder(run: Path, shapes: Path, *flags: str) -> list[str]:
    """The words after `illume` that train one for `STEPS` steps, with a checkpoint of every other one."""
    text = (ROOT / "experiments/shapes/vision_encoder.yaml").read_text()
    callbacks = [
        callback
        for callback in yaml.safe_load(text)["trainer"]["callbacks"]
        if callback["class_path"].rpartition(".")[2] in ("ExactResume", "Throughput", "Checkpoint")
    ]
    callbacks[-1]["init_args"] |= {"every_n_train_steps": 2, "save_top_k": -1}
    run.parent.mkdir(parents=True, exist_ok=True)
    overlay = run.parent / f"{run.name}.yaml"
    tower = {"init_args": {"model": {"init_args": {"tower": {"init_args": {"depth": 1, "width": 32}}}}}}
    logger = {
        "class_path": "illume_lightning.lit.metrics_logger.MetricsLogger",
        "init_args": {"save_dir": str(run), "name": "metrics"},
    }
    overlay.write_text(
        yaml.safe_dump({"trainer": {"callbacks": callbacks, "logger": [logger]}, "model": tower})
    )
    return [
        "fit",
        *("-c", str(ROOT / "experiments/shapes/vision_encoder.yaml"), "-c", str(overlay)),
        f"--trainer.default_root_dir={run}",
        f"--trainer.max_steps={STEPS}",
        f"--curriculum.phases=[{{until_step: {STEPS}, mode: fixed, side: 64, batch_size: 4, micro_batch_size: 2}}]",
        "--trainer.log_every_n_steps=1",
        f"--trainer.val_check_interval={STEPS}",
        "--data.val_sizes=[64]",
        "--data.val_limit=4",
        "--data.num_workers=0",
        f"--data.train=[{{path: {shapes / 'train'}}}]",
        f"--data.val={{shapes: {shapes / 'val'}}}",
        *flags,
    ]
