"""What runs on simulated NPUs; lit/test_npu.py starts it in a process of its own, as torch can't forget a device."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import test_diffusion_decoder_module as decoder
import test_dualvitok_module as dualvitok
import test_half_precision as half
import test_mllm_stages as mllm
import torch
import two_devices
from lightning.pytorch.callbacks import DeviceStatsMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from test_diffusion_decoder_module import tokenizer  # noqa: F401  # a fixture
from test_mllm_stages import world  # noqa: F401  # a fixture
from tiny_run import write_dualvitok_run, write_mllm_run
from tiny_trainer import trainer_for
from torch import nn

import cli
from callbacks import PredictionAnswers
from illume_lightning import Illume
from illume_lightning.data.plan import Phase
from illume_lightning.data.text_tokenizer import TextTokenizer
from illume_lightning.doctor import report
from illume_lightning.lit.conversation_data import ConversationDataModule
from illume_lightning.lit.datamodule import ImageDataModule, Source
from illume_lightning.lit.device import choose_device
from illume_lightning.lit.mllm import MLLMStage3
from illume_lightning.lit.npu import NPUAccelerator
from illume_lightning.lit.npu_strategies import trainer_options
from illume_lightning.lit.saved_run import SavedRun
from illume_lightning.nn.mllm import MLLM

ON_NPU = {"accelerator": "npu", "strategy": "npu_single_device", "devices": [1]}
ON_CPU = {"accelerator": "cpu", "devices": 1}


class Seen(L.Callback):
    """Where weights, gradients, optimizer state and batches are, and types of activations."""

    def __init__(self) -> None:
        self.devices: set[str] = set()
        self.activations: set[tuple[str, torch.dtype]] = set()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for module in pl_module.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.register_forward_hook(self._note)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Building networks has drawn from the CPU's generator alone."""
        torch.manual_seed(7)

    def _note(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        self.activations.add((str(output.device), output.dtype))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, _: Any) -> None:
        tensors = [*pl_module.parameters(), *pl_module.buffers()]
        tensors += [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
        for optimizer in trainer.optimizers:
            states = optimizer.state.values()
            tensors += [value for state in states for name, value in state.items() if name != "step"]
        self.devices |= {str(tensor.device) for tensor in tensors}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.devices.add(str(batch[0].device))

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.devices |= {str(parameter.device) for parameter in pl_module.parameters()}

    on_predict_batch_end = on_validation_batch_end


def trainer_on(
    where: dict[str, Any], phases: list[Phase], *callbacks: L.Callback, **options: Any
) -> L.Trainer:
    return trainer_for(None, phases, *callbacks, deterministic=False, **(where | options))


def pictures(shapes: Path) -> ImageDataModule:
    held_out = {"shapes": str(shapes / "val")}
    return ImageDataModule(
        [Source(str(shapes / "train"))],
        val=held_out,
        predict=held_out,
        val_sizes=[64],
        val_limit=4,
        num_workers=0,
    )


class Features(nn.Module):
    """Of pictures, for a Frechet distance."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((2, 3))


def assert_near(one: torch.Tensor, other: torch.Tensor) -> None:
    """Pictures, uint8: up to a rounding error's difference."""
    assert one.dtype == torch.uint8
    assert (one.cpu().int() - other.cpu().int()).abs().max() <= 1


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Adam's first steps would make large differences of rounding errors."""
    return torch.optim.SGD(parameters, lr=0.01)


def assert_equal_weights(one: nn.Module, other: nn.Module) -> None:
    state = other.state_dict()
    for key, value in one.state_dict().items():
        torch.testing.assert_close(value.cpu(), state[key].cpu(), rtol=1e-4, atol=1e-6, msg=key)


# -- every part trains on the device as on the CPU --


def test_dualvitok_with_its_discriminator(shapes):
    trained, distances, made = [], [], []
    for where in (ON_NPU, ON_CPU):
        options = {"optimizer": sgd, "discriminator_optimizer": sgd, "fid_features": Features()}
        seen, module = Seen(), dualvitok.build(**options)
        phases, data = [Phase(3, "fixed", 64, 4, 2)], pictures(shapes)
        trainer = trainer_on(where, phases, seen, num_sanity_val_steps=0, val_check_interval=4)
        trainer.fit(module, data)
        trained.append(module)
        metrics = dict(trainer.callback_metrics)
        distances.append(float(metrics["val/shapes-64/frechet_features"]))
        made.append(trainer.predict(module, data)[0])
        device = "npu:1" if where is ON_NPU else "cpu"
        assert seen.devices == {device}
        assert seen.activations == {(device, torch.float32)}
        assert trainer.global_step == 3
        assert 5 < metrics["val/shapes-64/psnr"] < 40
    assert_equal_weights(*trained)
    assert_near(*made)
    assert distances[0] == pytest.approx(distances[1], rel=1e-3) and distances[0] > 0


def test_the_diffusion_decoder(shapes, tokenizer):  # noqa: F811
    trained, made = [], []
    for where in (ON_NPU, ON_CPU):
        seen, module = Seen(), decoder.build(tokenizer)
        module._optimizer = sgd
        trainer = trainer_on(where, decoder.phases(2), seen, limit_predict_batches=1)
        trainer.fit(module, decoder.datamodule(shapes / "train"))
        made.append(trainer.predict(module, pictures(shapes))[0])
        trained.append(module)
        assert seen.devices == {"npu:1" if where is ON_NPU else "cpu"}
    assert_equal_weights(*trained)
    assert made[0].keys() == {"dualvitok", "diffusion"}
    for name, images in made[0].items():
        assert_near(images, made[1][name])


def test_an_mllm_stage(world):  # noqa: F811
    trained, losses = [], []
    for where in (ON_NPU, ON_CPU):
        seen, module = Seen(), mllm.build(world, MLLMStage3, vit_from_layer=0, optimizer=sgd)
        data = mllm.data(world, *mllm.TASKS, cached=False, condition_dropout=0.0)
        trainer = trainer_on(where, mllm.phases(2), seen)
        trainer.fit(module, data)
        (metrics,) = trainer.validate(module, data, verbose=False)[:1]
        trained.append(module)
        losses.append([value for name, value in sorted(metrics.items()) if "loss" in name])
        assert seen.devices == {"npu:1" if where is ON_NPU else "cpu"}
    assert_equal_weights(*trained)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("name", ["codebook start", "vision encoder", "decoder", "stage 1", "stage 3"])
def test_it_trains_and_validates_as_on_the_cpu(name, world, shapes):  # noqa: F811
    """Losses, and metrics of a validation by itself."""
    found = []
    for where in (ON_NPU, ON_CPU):
        seen, part = Seen(), half.PARTS[name](world, shapes)
        part[0]._optimizer = sgd
        record, metrics, _ = half.run(part, "32-true", seen, deterministic=False, **where)
        assert seen.devices == {"npu:1" if where is ON_NPU else "cpu"}
        found.append({key: float(value) for key, value in record.logged.items()} | metrics)
    assert found[0].keys() == found[1].keys()
    for key in (key for key in found[0] if "loss" in key or key.endswith(("psnr", "ssim"))):
        assert found[0][key] == pytest.approx(found[1][key], rel=1e-3, abs=1e-4), key


def test_weights_in_bfloat16(world, shapes):  # noqa: F811
    seen = Seen()
    _, metrics, module = half.run(
        half.dualvitok(world, shapes), "bf16-true", seen, deterministic=False, **ON_NPU
    )
    assert seen.activations == {("npu:1", torch.bfloat16)}
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert 5 < metrics["val/shapes-64/psnr"] < 40


def test_there_is_no_fp64():
    """So all that runs here does without it, as NPUs' kernels do."""
    for make in (
        lambda: torch.zeros(2, dtype=torch.float64, device="npu"),
        lambda: torch.zeros(2, device="npu").double(),
        lambda: torch.zeros(2, dtype=torch.float64).to("npu"),
    ):
        with pytest.raises(TypeError, match="npu has no float64"):
            make()


# -- a run goes on --


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_a_resumed_run_equals_an_uninterrupted_one(shapes, tmp_path, precision):
    """With token noise and dropout, which draw from the device's generator."""
    phases = [Phase(4, "fixed", 64, 2, 2)]

    def fit(**options: Any) -> L.LightningModule:
        module = dualvitok.build()
        save = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
        trainer = trainer_on(ON_NPU, phases, save, precision=precision, limit_val_batches=0)
        trainer.fit(module, pictures(shapes), weights_only=True, **options)
        return module

    L.seed_everything(7, verbose=False)
    whole = fit()
    saved = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    (state,) = saved["callbacks"]["ExactResume"]["ranks"]
    assert state["device_type"] == "npu" and len(state["device"]) > 1000
    L.seed_everything(99, verbose=False)
    again = fit(ckpt_path=tmp_path / "step=2.ckpt")
    for key, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


# -- precision --


class Tiny(L.LightningModule):
    """Two layers and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 1))

    def training_step(self, batch, batch_idx):
        loss = self.net(batch[0]).float().square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def loader() -> torch.utils.data.DataLoader:
    values = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(values), batch_size=2)


def fit_tiny(folder: Path, *callbacks: L.Callback, **options: Any) -> tuple[L.Trainer, Tiny]:
    given = {"max_steps": 4, "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    given |= {"enable_checkpointing": False, "callbacks": list(callbacks), "default_root_dir": folder}
    L.seed_everything(1, verbose=False)
    trainer, module = L.Trainer(**(given | ON_NPU | options)), Tiny()
    trainer.fit(module, loader())
    return trainer, module


@pytest.mark.parametrize(
    ("precision", "activation", "weight"),
    [
        ("32-true", torch.float32, torch.float32),
        ("bf16-mixed", torch.bfloat16, torch.float32),
        ("16-mixed", torch.float16, torch.float32),
        ("bf16-true", torch.bfloat16, torch.bfloat16),
    ],
)
def test_precision_is_the_devices_own(tmp_path, precision, activation, weight):
    seen = Seen()
    trainer, module = fit_tiny(tmp_path, seen, precision=precision)
    assert seen.activations == {("npu:1", activation)}
    assert module.net[0].weight.dtype == weight
    assert trainer.precision == precision
    if precision == "16-mixed":
        assert trainer.precision_plugin.scaler.is_enabled()
        assert trainer.precision_plugin.scaler._device == "npu"


def test_the_mllm_computes_in_bfloat16_with_fp32_weights(world):  # noqa: F811
    seen, module = Seen(), mllm.build(world)
    trainer_on(ON_NPU, mllm.phases(2), seen, precision="bf16-mixed").fit(
        module, mllm.data(world, "generation")
    )
    assert ("npu:1", torch.bfloat16) in seen.activations
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


# -- devices --


def test_seeds_reach_the_device(tmp_path):
    _, one = fit_tiny(tmp_path)
    _, again = fit_tiny(tmp_path)
    assert all(map(torch.equal, one.state_dict().values(), again.state_dict().values()))
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(torch.rand(4, device="npu").tolist())
    assert draws[0] == draws[1] != draws[2]


def test_memory_is_monitored(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    fit_tiny(tmp_path, DeviceStatsMonitor(), logger=logger, log_every_n_steps=1)
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0]
    assert "DeviceStatsMonitor.on_train_batch_end/allocated_bytes.all.peak" in header
    assert NPUAccelerator().get_device_stats("npu:0")["allocated_bytes.all.peak"] > 1000


def test_auto_takes_npus():
    assert choose_device("auto").type == "npu"
    assert choose_device("npu:1").index == 1
    with pytest.raises(ValueError, match="there is no npu:2: there are 2 NPUs, counted from 0"):
        choose_device("npu:2")
    assert trainer_options({}) == {"accelerator": "npu", "strategy": "npu_ddp"}
    assert trainer_options({"devices": 1})["strategy"] == "npu_single_device"
    assert trainer_options({"devices": [1], "num_nodes": 2})["strategy"] == "npu_ddp"
    assert trainer_options({"accelerator": "cpu"}) == {}
    assert "npu:1: Simulated NPU, 16 GiB" in report()


def test_lightnings_own_choice_is_refused_rather_than_the_cpu(tmp_path):
    with pytest.raises(ValueError, match="a strategy that computes on cpu: choose a strategy of npu"):
        fit_tiny(tmp_path, strategy="auto")
    with pytest.raises(ValueError, match="single_device is for one NPU, devices are npu:0, npu:1"):
        fit_tiny(tmp_path, devices=2)


# -- use --


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):  # noqa: F811
    """A DualViTok's and an MLLM's, as `illume fit` leaves them."""
    folder = tmp_path_factory.mktemp("runs")
    text = TextTokenizer(world / "text_tokenizer")
    write_mllm_run(folder / "mllm", text, write_dualvitok_run(folder / "dualvitok"), slot_grid=4)
    return folder


def test_pictures_of_the_device_are_those_of_the_cpu(runs):
    made = []
    for device in ("auto", "cpu"):
        given = {"device": device, "slots": 4, "context": 512}
        illume = Illume.from_run(runs / "mllm", runs / "dualvitok", **given)
        assert illume.engine.device.type == ("npu" if device == "auto" else "cpu")
        images = illume.generate(["a red circle", "two stars"], seeds=[3, 4])
        answer = illume.chat([{"role": "user", "content": "how many?"}], max_tokens=6)
        edited = illume.edit(images[0], "make it blue")
        made.append(([np.asarray(image, np.int16) for image in (*images, *edited)], answer.text))
    for one, other in zip(made[0][0], made[1][0], strict=True):
        assert np.abs(one - other).max() <= 1
    assert made[0][1] == made[1][1]
    assert made[0][0][0].std() > 0


def test_an_mllm_predicts_as_on_the_cpu(runs, tmp_path):
    lines = [
        {"prompt": "a square", "id": "made"},
        {"image": "made.png", "instruction": "bigger", "id": "edited"},
    ]
    (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "made.png")
    run, found = SavedRun(runs / "mllm"), []
    for where in (ON_NPU, ON_CPU):
        module = MLLMStage3(
            run.build(MLLM, "model", "init_args", "mllm"), 0, tokenizer=str(runs / "dualvitok")
        )
        text = str(run.section("data", "init_args", "text_tokenizer"))
        data = ConversationDataModule(text, module.model.vocabulary, predict=str(tmp_path / "jobs.jsonl"))
        folder, seen = tmp_path / where["accelerator"], Seen()
        phases = [Phase(1, "fixed", 32, 1, 1)]
        trainer = trainer_for(folder, phases, PredictionAnswers(), seen, deterministic=False, **where)
        trainer.predict(module, data, return_predictions=False, ckpt_path=run.checkpoint)
        assert seen.devices == {"npu:1" if where is ON_NPU else "cpu"}
        names = [folder / "predictions" / "pictures" / f"{line['id']}.png" for line in lines]
        found.append([np.asarray(Image.open(name), np.int16) for name in names])
    for one, other in zip(*found, strict=True):
        assert np.abs(one - other).max() <= 1 and one.std() > 0


def test_the_command_generates_on_the_device(runs, tmp_path):
    parts = ["--tokenizer", str(runs / "dualvitok"), "--slots=4", "--context=512"]
    cli.main(["generate", str(runs / "mllm"), str(tmp_path), "a square", "--device=npu:1", *parts])
    (line,) = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert json.loads(line)["made_by"]["device"] == "npu"
    assert torch.accelerator.current_device_index() == 1


def test_the_command_trains_on_the_device(shapes, tmp_path, capsys):
    """Then goes on by itself; the saved configuration keeps what was asked for."""
    yaml = Path(cli.__file__).parent / "experiments" / "shapes" / "vision_encoder.yaml"
    stores = [f"--data.train=[{{path: {shapes / 'train'}}}]", f"--data.val={{shapes: {shapes / 'val'}}}"]
    phases = "[{{until_step: {}, mode: fixed, side: 112, batch_size: 2, micro_batch_size: 2}}]"
    seen = []
    for steps in (1, 2):
        flags = [f"--trainer.default_root_dir={tmp_path}", "--trainer.limit_val_batches=0", *stores]
        flags += ["--data.num_workers=0", f"--trainer.max_steps={steps}", "--trainer.devices=1"]
        run = cli.run(
            [
                "fit",
                "-c",
                str(yaml),
                *flags,
                f"--curriculum.phases={phases.format(steps)}",
                "--trainer.accelerator=npu",
            ]
        )
        assert run.trainer.global_step == steps
        seen.append(run.trainer.strategy.root_device)
    assert seen == [torch.device("npu:0")] * 2
    saved = (tmp_path / "config.yaml").read_text()
    assert "accelerator: npu" in saved and "strategy: auto" in saved


# -- several --


def test_two_devices_end_with_the_weights_of_one(world, shapes, tmp_path):  # noqa: F811
    """The simulated HCCL refuses averages, as the real one does; `Result` asks for one."""
    command = [sys.executable, two_devices.__file__, str(world), str(shapes), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    for name, (_, train) in two_devices.PARTS.items():
        alone = train(ON_CPU, world, shapes)
        for rank in range(2):
            found = torch.load(tmp_path / f"{name}{rank}", weights_only=True)
            assert (found["device"], found["mean_rank"]) == (f"npu:{rank}", 0.5)
            if rank > 0 and "sharded" in name:  # the first one has gathered them
                continue
            assert found["weights"].keys() == alone["weights"].keys()
            for key, value in alone["weights"].items():
                torch.testing.assert_close(
                    found["weights"][key], value, rtol=1e-4, atol=1e-6, msg=f"{name} {key}"
                )
