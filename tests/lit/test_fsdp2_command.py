"""FSDP2 by the command: low-rank matrices, checkpoints of both kinds, going on, and one file of a folder."""

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_mllm_stages import SIDE, vocabulary, world  # noqa: F401  # a fixture

import cli
from illume_lightning.nn.sharded_checkpoint import is_sharded

ROOT = Path(__file__).parents[2]
PATH = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "lit")))
TASKS = ("captioning", "generation")


def write_config(world: Path, folder: Path) -> Path:  # noqa: F811
    """A stage 3 with low-rank matrices, saved after every step; earlier checkpoints but one are removed."""
    checkpoint = {"dirpath": "${trainer.default_root_dir}/checkpoints", "filename": "{step}"}
    mllm = {"vocabulary": asdict(vocabulary(world)), "slot_grid": 4}
    config = {
        "seed_everything": 0,
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": -1,
            "default_root_dir": str(folder),
            "use_distributed_sampler": False,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "check_val_every_n_epoch": None,
            "logger": False,
            "callbacks": [
                {"class_path": "callbacks.ExactResume"},
                {
                    "class_path": "callbacks.Checkpoint",
                    "init_args": checkpoint | {"every_n_train_steps": 1, "save_top_k": 1, "save_last": True},
                },
            ],
        },
        "data": {
            "class_path": "illume_lightning.lit.conversation_data.ConversationDataModule",
            "init_args": {
                "text_tokenizer": str(world / "text_tokenizer"),
                "train": {task: {"path": str(world / task / "train")} for task in TASKS},
                "val": {task: {"path": str(world / task / "val")} for task in TASKS},
                "row_tokens": 256,
                "val_side": SIDE,
                "num_workers": 0,
            },
        },
        "model": {
            "class_path": "illume_lightning.lit.mllm.MLLMStage3",
            "init_args": {
                "mllm": {"class_path": "tiny_mllm.build_mllm", "init_args": mllm},
                "tokenizer": str(world / "dualvitok"),
                "vit_from_layer": 0,
                "lora": {"rank": 4, "alpha": 8},
                "learning_rates": {"adapters": 0.05, "llm": 0.05, "vision_tower": 0.05},
                "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05, "momentum": 0.9}},
            },
        },
    }
    folder.mkdir()
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder / "run.yaml"


def flags(steps: int) -> list[str]:
    phase = {"until_step": steps, "mode": "fixed", "side": SIDE, "batch_size": 8, "micro_batch_size": 2}
    return [f"--trainer.max_steps={steps}", f"--curriculum.phases=[{phase}]"]


def fit_by_two(config: Path, steps: int, strategy: str) -> None:
    words = ["fit", "-c", str(config), *flags(steps), f"--trainer.strategy={strategy}", "--trainer.devices=2"]
    command = [sys.executable, "-W", "ignore", "-m", "cli", *words]
    environment = os.environ | {"PYTHONPATH": PATH}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_two_devices_with_shards_end_where_one_does(world, tmp_path, capsys):  # noqa: F811
    alone = write_config(world, tmp_path / "one")
    cli.main(["fit", "-c", str(alone), *flags(4)])
    expected = torch.load(tmp_path / "one/checkpoints/last.ckpt", weights_only=True)
    config = write_config(world, tmp_path / "two")
    checkpoints = tmp_path / "two" / "checkpoints"
    last = checkpoints / "last.ckpt"
    fit_by_two(config, 2, "fsdp2")
    assert last.is_file() and (checkpoints / "step=2.ckpt").is_file()
    fit_by_two(config, 3, "fsdp2_sharded")  # goes on from the file
    assert is_sharded(last) and is_sharded(checkpoints / "step=3.ckpt")
    fit_by_two(config, 4, "fsdp2_sharded")  # goes on from the folder
    assert is_sharded(last) and not (checkpoints / "step=2.ckpt").exists()
    validate: list[Any] = ["validate", "-c", str(config), *flags(4)]
    with pytest.raises(SystemExit) as stop:
        cli.main(validate)
    assert stop.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "a run without FSDP2 (SingleDeviceStrategy) takes a file" in message
    assert f"`illume consolidate {last} {last}`" in message
    cli.main(["consolidate", str(last), str(last)])
    assert last.is_file() and is_sharded(checkpoints / "last.ckpt.sharded")
    found = torch.load(last, weights_only=True)
    assert found["global_step"] == expected["global_step"] == 4
    assert any(".lora_" in name for name in found["state_dict"])
    assert found["state_dict"].keys() == expected["state_dict"].keys()
    for name, value in expected["state_dict"].items():
        torch.testing.assert_close(found["state_dict"][name], value, rtol=1e-4, atol=1e-5, msg=name)
    metrics = cli.run(validate).trainer.callback_metrics
    assert 0 < metrics["val/captioning/text_loss"] < 20
