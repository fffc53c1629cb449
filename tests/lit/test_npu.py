"""Ascend NPUs: what is refused where there are none, and all that runs on simulated ones."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from simulated_npu import build

import cli
from illume_lightning import doctor
from illume_lightning.lit.device import choose_device
from illume_lightning.lit.npu import NPUAccelerator
from illume_lightning.lit.npu_strategies import NPUDDPStrategy, trainer_options

ROOT = Path(__file__).parents[2]
NPU = {"accelerator": "npu"}


@pytest.fixture
def npus(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """`torch.npu` of a machine with four, as far as choosing among them goes."""
    module = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 4,
        is_bf16_supported=lambda: True,
        amp=SimpleNamespace(GradScaler=lambda: "the NPU's scaler"),
    )
    monkeypatch.setattr(torch, "npu", module, raising=False)
    return module


@pytest.fixture
def torch_npu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A torch_npu without CANN."""
    (tmp_path / "torch_npu.py").write_text(
        "raise ImportError('libhccl.so: cannot open shared object file: No such file or directory')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


# -- where there are none --


def fails(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(args)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def fit(*flags: str) -> list[str]:
    """A run whose model can't be built, so that an error about devices has come before."""
    yaml = ROOT / "experiments" / "shapes" / "vision_encoder.yaml"
    return ["fit", "-c", str(yaml), "--model.model.tower.width=33", *flags]


def test_torch_npu_is_imported_in_one_place_and_only_when_it_is_called():
    importers = {}
    for path in [*(ROOT / "illume_lightning").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")]:
        tree = ast.parse(path.read_text())
        names = [
            alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
        ]
        at_once = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
        if "torch_npu" in names:
            importers[path.name] = "torch_npu" in at_once
    assert importers == {"npu.py": False}


def test_without_torch_npu(capsys):
    expected = "npu devices need torch_npu, which is not installed: install CANN, then pip install"
    assert expected in fails(capsys, *fit("--trainer.accelerator=npu"))
    with pytest.raises(ImportError, match=expected):
        choose_device("npu:0")
    with pytest.raises(ImportError, match=expected):
        L.Trainer(accelerator="npu", strategy="npu_ddp")
    assert choose_device("auto").type != "npu"
    assert not NPUAccelerator.is_available()
    assert trainer_options({}) == {}
    assert "npu: none; npu devices need torch_npu" in doctor.report()


def test_without_cann(torch_npu, capsys):
    """Whatever the device, as transformers imports it too."""
    expected = "torch_npu is installed and can't be loaded (libhccl.so: cannot open shared object file"
    assert expected in fails(capsys, *fit("--trainer.accelerator=npu"))
    for name in ("npu", "auto"):
        with pytest.raises(ImportError, match="source set_env.sh"):
            choose_device(name)
    with pytest.raises(ImportError, match="install CANN"):
        trainer_options({})
    assert expected in doctor.report()


def test_doctor_explains_why_torch_itself_fails(torch_npu):
    """An installed torch_npu is imported by `import torch`."""
    info = torch_npu / "torch_npu-2.14.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch-npu\nVersion: 2.14.0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    code = "from illume_lightning.doctor import report\nprint(report())"
    environment = os.environ | {"PYTHONPATH": f"{torch_npu}:{ROOT}"}
    environment.pop("TORCH_DEVICE_BACKEND_AUTOLOAD", None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "torch can't be imported: Failed to load the backend extension: torch_npu" in done.stdout
    assert "libhccl.so" in done.stdout
    assert "uninstall torch_npu (TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps torch from it" in done.stdout


def test_without_a_device(npus, capsys):
    npus.device_count = lambda: 0
    npus.is_available = lambda: False
    assert "torch_npu sees no NPU: `npu-smi info` lists them" in fails(
        capsys, *fit("--trainer.accelerator=npu")
    )
    assert trainer_options({"accelerator": "auto"}) == {}
    assert choose_device("auto").type != "npu"


# -- devices and strategies --


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        (2, [0, 1]),
        ("2", [0, 1]),
        (-1, [0, 1, 2, 3]),
        ("auto", [0, 1, 2, 3]),
        ([3], [3]),
        ("1,3", [1, 3]),
        ("2,", [2]),
    ],
)
def test_devices_are_numbers_or_lists(npus, devices, expected):
    assert NPUAccelerator.parse_devices(devices) == expected


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        (5, "devices is 5, and there are 4 NPUs: choose 1 to 4"),
        (0, "devices is 0, and there are 4 NPUs"),
        ([0, 4], "there is no npu:4: there are 4 NPUs, counted from 0"),
        ("1,1", "name each NPU once"),
        ("two", "devices is 'two': give a number of NPUs"),
    ],
)
def test_devices_that_are_not_there(npus, capsys, devices, expected):
    with pytest.raises(ValueError, match=expected):
        trainer_options(NPU | {"devices": devices})
    if devices == 5:
        assert expected in fails(capsys, *fit("--trainer.accelerator=npu", "--trainer.devices=5"))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"devices": 1}, "npu_single_device"),
        ({"devices": 2}, "npu_ddp"),
        ({"devices": 1, "num_nodes": 2}, "npu_ddp"),
        ({"strategy": "ddp_find_unused_parameters_true"}, "npu_ddp_find_unused_parameters_true"),
        ({"strategy": "fsdp2"}, "npu_fsdp2"),
        ({"strategy": "npu_fsdp2_sharded"}, "npu_fsdp2_sharded"),
    ],
)
def test_names_of_strategies_stand_for_those_of_npus(npus, given, expected):
    assert trainer_options(NPU | given) == {"accelerator": "npu", "strategy": expected}
    assert expected in StrategyRegistry


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {"strategy": "deepspeed"},
            "accelerator npu has no strategy 'deepspeed': choose auto, single_device, ddp",
        ),
        (
            {"strategy": "single_device", "devices": 2},
            "single_device is for one NPU: choose auto, ddp or fsdp2",
        ),
        ({"strategy": DDPStrategy()}, "DDPStrategy is not of NPUs: choose one of single_device"),
        (
            {"strategy": {"class_path": "lightning.pytorch.strategies.DDPStrategy"}},
            "DDPStrategy is not of NPUs",
        ),
        ({"precision": "64-true"}, "precision 64-true: NPUs compute in fp32 instead"),
        (
            {"accelerator": "cpu", "strategy": "npu_ddp"},
            "npu_ddp is for accelerator npu, and accelerator is cpu",
        ),
    ],
)
def test_strategies_that_do_not_fit(npus, given, expected):
    with pytest.raises(ValueError, match=expected):
        trainer_options(NPU | given)


def test_a_class_of_npus_with_arguments_of_its_own(npus):
    path = f"{NPUDDPStrategy.__module__}.NPUDDPStrategy"
    given = {"class_path": path, "init_args": {"static_graph": True}}
    assert trainer_options(NPU | {"strategy": given})["strategy"] is given


def test_the_first_npus_have_no_bfloat16(npus):
    npus.is_bf16_supported = lambda: False
    with pytest.raises(
        ValueError, match="precision bf16-mixed: this NPU has no bfloat16; choose 16-mixed or 32-true"
    ):
        trainer_options(NPU | {"precision": "bf16-mixed"})
    assert trainer_options(NPU | {"precision": "16-mixed", "devices": 1})


@pytest.mark.parametrize(("precision", "scaler"), [("bf16-mixed", None), ("16-mixed", "the NPU's scaler")])
def test_mixed_precision_is_the_npus(npus, precision: Any, scaler: Any):
    strategy = NPUDDPStrategy()
    strategy.precision_plugin = MixedPrecision(precision, "cpu", None)
    assert (strategy.precision_plugin.device, strategy.precision_plugin.scaler) == ("npu", scaler)
    own = strategy.precision_plugin
    strategy.precision_plugin = own
    assert strategy.precision_plugin is own


# -- on simulated ones --


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Of a process in which `import torch_npu` brings two simulated NPUs."""
    try:
        library = build.build()
    except FileNotFoundError as error:
        pytest.skip(f"the simulated NPU can't be compiled: {error}")
    folders = (build.SOURCE.parent, ROOT / "tests" / "lit", ROOT / "tests", ROOT)
    return os.environ | {"SIMULATED_NPU": str(library), "PYTHONPATH": os.pathsep.join(map(str, folders))}


def test_everything_runs_on_simulated_npus(environment):
    """Its tests are those of simulated_npu/on_device.py."""
    tests = str(build.SOURCE.with_name("on_device.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", tests]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=280)
    assert done.returncode == 0, done.stdout[-8000:]
