"""Any number of devices, by any strategy, trains as one does; what can't work is refused; failures end a run."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import strategy_runs
import torch
from strategy_runs import ALL, FEW, Result, alone, resumable
from test_mllm_stages import world  # noqa: F401  # a fixture

from illume_lightning.data.schedule import Phase
from illume_lightning.lit.strategy import check_trainer_options
from illume_lightning.nn.checkpoints import check_state_dict
from illume_lightning.nn.sharded_checkpoint import consolidate, is_sharded, read_weights, require_file

HERE = Path(__file__).parent
PATH = os.pathsep.join(map(str, (HERE.parents[1], HERE, HERE.parent)))


@pytest.fixture(scope="module")
def stores(world, shapes) -> Path:  # noqa: F811
    """Every task of the MLLM, and pictures with regions."""
    (world / "shapes").symlink_to(shapes, target_is_directory=True)
    return world


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("strategies")


@pytest.fixture(scope="module")
def expected(stores, out) -> dict[str, Result]:
    return alone(stores, out)


@pytest.fixture(scope="module")
def by_two(stores, out, expected) -> list[dict[str, Result]]:
    return by_several(2, stores, out, ALL)


@pytest.fixture(scope="module")
def by_three(stores, out, by_two) -> list[dict[str, Result]]:
    return by_several(3, stores, out, FEW)


@pytest.fixture(scope="module")
def by_three_all(stores, out, by_two) -> list[dict[str, Result]]:
    return by_several(3, stores, out, [name for name in ALL if name not in FEW])


def start(command: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Our scripts in processes of their own, which find what these tests do."""
    environment = {**os.environ, "PYTHONPATH": PATH}
    return subprocess.run(command, timeout=timeout, capture_output=True, text=True, env=environment)


def by_several(devices: int, stores: Path, out: Path, names: list[str]) -> list[dict[str, Result]]:
    """What each process has in the end."""
    given = [str(devices), str(stores), str(out), *names]
    command = [sys.executable, "-W", "ignore", str(HERE / "strategy_runs.py"), *given]
    done = start(command, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(out / f"results{devices}-{rank}.pt", weights_only=True) for rank in range(devices)]


def assert_equal(found: Result, expected: Result) -> None:
    """Losses, metrics and weights to 1e-6; gradients, sums of very many terms, to 1e-5."""
    assert found.keys() <= expected.keys()
    for name, value in found.items():
        tolerance = 1e-5 if name.startswith("gradient") else 1e-6
        torch.testing.assert_close(
            value, expected[name], rtol=1e-5, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def runs_by_three() -> list[Any]:
    few = [("by_three", name) for name in FEW]
    return few + [
        pytest.param("by_three_all", name, marks=pytest.mark.slow) for name in ALL if name not in FEW
    ]


@pytest.mark.parametrize(("fixture", "name"), [("by_two", name) for name in ALL] + runs_by_three())
def test_several_devices_train_as_one_does(fixture, name, expected, request):
    wanted = expected[name]
    for results in request.getfixturevalue(fixture):
        found = results[name]
        assert found.keys() == wanted.keys()
        if name != "fsdp2: bf16":
            assert_equal(found, wanted)
            continue
        for key in (key for key in found if key.startswith("model.")):
            torch.testing.assert_close(found[key], wanted[key], rtol=0, atol=2e-3, msg=key)


@pytest.mark.parametrize("name", ["resumed from a file", "resumed from a folder"])
def test_more_devices_go_on_where_fewer_stopped(name, expected, by_two, by_three):
    for results in by_three if name == "resumed from a folder" else (*by_two, *by_three):
        assert "train/loss after 2" not in results[name] and "train/loss after 3" in results[name]
        assert_equal(results[name], expected["resumed"])


@pytest.fixture
def environment() -> Iterator[None]:
    """FSDP2 on one device leaves a process group and variables behind."""
    before = dict(os.environ)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


def test_one_device_goes_on_where_two_stopped(stores, out, expected, by_two, tmp_path, environment):
    folder, file = out / "folder2.ckpt", tmp_path / "one.ckpt"
    assert is_sharded(folder) and not (out / "folder2.ckpt.partial").exists()
    consolidate(folder, file)
    for path, strategy in ((out / "file2.ckpt", "auto"), (file, "auto"), (folder, "fsdp2")):
        found = resumable(stores, 1, strategy=strategy, ckpt_path=str(path))
        assert "train/loss after 2" not in found
        assert_equal(found, expected["resumed"])
    saved = torch.load(file, weights_only=True)
    weights = read_weights(folder)
    check_state_dict(saved["state_dict"], weights, "the folder")
    assert all(torch.equal(weights[name], value) for name, value in saved["state_dict"].items())


def test_a_folder_in_the_place_of_a_file(out, by_two, tmp_path):
    place = tmp_path / "last.ckpt"
    shutil.copytree(out / "folder2.ckpt", place)
    with pytest.raises(ValueError, match=f"evaluation takes a file: .*`illume consolidate {place} {place}`"):
        require_file(place, "evaluation")
    consolidate(place, place)
    require_file(place, "evaluation")
    assert place.is_file() and is_sharded(tmp_path / "last.ckpt.sharded")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "last.ckpt.sharded"]


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is no sharded checkpoint: it has no meta.pt"):
        consolidate(tmp_path, tmp_path / "one.ckpt")


# -- failures --


def fail(what: str) -> tuple[int, str]:
    """Exit status and errors of a run that goes wrong; all its processes have ended."""
    began = time.monotonic()
    command = [sys.executable, "-W", "ignore", str(HERE / "failing_run.py"), what]
    done = start(command, timeout=100)
    processes = [int(number) for number in re.findall(r"^process (\d+)", done.stderr, re.MULTILINE)]
    assert len(processes) == 2
    while any(Path(f"/proc/{process}").exists() for process in processes):
        assert time.monotonic() - began < 120
        time.sleep(0.2)
    return done.returncode, done.stderr


def test_an_error_on_one_process_ends_all():
    status, errors = fail("raise 1")
    assert status != 0
    assert "ValueError: the sample of process 1 is spoilt" in errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("raise 0", "ValueError: the sample of process 0 is spoilt"),
        ("setup", "FileNotFoundError: process 1 finds no store"),
        ("kill 1", ""),
        ("kill 0", ""),
    ],
)
def test_a_failing_process_ends_all(what, message):
    status, errors = fail(what)
    assert status != 0
    assert message in errors


# -- bad input --

CPU = {"accelerator": "cpu", "devices": 2}
PARALLEL = "lightning.pytorch.strategies.ModelParallelStrategy"
STAGE = "illume_lightning.lit.mllm.MLLMStage2"
EMA = "lightning.pytorch.callbacks.EMAWeightAveraging"


def parallel(data: int, tensor: int) -> dict:
    return {"class_path": PARALLEL, "init_args": {"data_parallel_size": data, "tensor_parallel_size": tensor}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accelerator": "warp"}, r"accelerator is 'warp': choose auto, gpu, cpu, cuda"),
        ({"num_nodes": 0}, "num_nodes is 0"),
        ({"devices": 0}, "devices is 0: give a positive number"),
        ({"devices": "many"}, "devices is 'many': give a number, a list"),
        ({"devices": [0, 1]}, r"devices is \[0, 1\]: on a CPU give a number"),
        ({"strategy": "dpp"}, "strategy is 'dpp': choose auto, ddp, fsdp2"),
        ({"strategy": "ddp_spawn"}, "ddp_spawn starts processes from within .* use ddp"),
        ({"strategy": "fsdp"}, "fsdp is FSDP's first version: use fsdp2"),
        ({"strategy": "single_device"}, "single_device is for one device, and there are 2"),
        ({"strategy": {"class_path": PARALLEL}}, "data_parallel_size auto .* use fsdp2, or 2 and 1"),
        ({"strategy": parallel(1, 2)}, "no tensor parallelism: use fsdp2, or 2 and 1"),
        ({"precision": "16-mixed"}, "16-mixed is not for CPUs: use bf16-mixed or 32-true"),
        ({"sync_batchnorm": True}, "sync_batchnorm needs CUDA, the accelerator is cpu: leave it out"),
        (
            {"strategy": "fsdp2", "callbacks": [{"class_path": EMA}]},
            "EMAWeightAveraging needs the whole model",
        ),
        (
            {"precision": "bf16-true", "callbacks": [{"class_path": EMA}]},
            "EMAWeightAveraging keeps an average .* use bf16-mixed",
        ),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        check_trainer_options(CPU | options)


def test_models_that_fsdp2_does_not_take():
    options = CPU | {"strategy": "fsdp2"}
    dualvitok = {"class_path": "illume_lightning.lit.dualvitok.DualViTokModule"}
    with pytest.raises(ValueError, match="DualViTokModule is not to be shared out .* use ddp"):
        check_trainer_options(options, model=dualvitok)
    muon = {"class_path": STAGE, "init_args": {"matrix_optimizer": {"class_path": "torch.optim.Muon"}}}
    with pytest.raises(ValueError, match="matrix_optimizer needs whole matrices"):
        check_trainer_options(options, model=muon)
    with pytest.raises(ValueError, match="fsdp2 is for training"):
        check_trainer_options(options, model={"class_path": STAGE}, command="predict")
    assert check_trainer_options(options, model={"class_path": STAGE}) == 2


def test_batches_that_processes_cannot_share():
    phase = Phase(9, "fixed", 64, strategy_runs.BATCH, 2)
    for processes in (1, 2, 3):
        assert check_trainer_options(CPU | {"devices": processes}, [phase]) == processes
    with pytest.raises(ValueError, match="12, which 5 processes can't share evenly: use 4 or 6 processes"):
        check_trainer_options(CPU | {"devices": 5}, [phase])
    assert check_trainer_options(CPU | {"devices": 5}, [phase], command="validate") == 5


def test_devices_and_precision_of_gpus(monkeypatch):
    with pytest.raises(ValueError, match="accelerator is 'cuda', and there is no such device"):
        check_trainer_options({"accelerator": "cuda"})
    for name, value in (("is_available", True), ("device_count", 4), ("get_device_name", "Tesla V100")):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda value=value: value)
    monkeypatch.setattr("lightning.pytorch.accelerators.CUDAAccelerator.auto_device_count", lambda: 4)
    monkeypatch.setattr("lightning.pytorch.accelerators.CUDAAccelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: False)
    cuda = {"accelerator": "cuda"}
    assert check_trainer_options(cuda) == 4
    assert check_trainer_options(cuda | {"devices": [1, 3], "num_nodes": 3}) == 6
    for devices in (5, "5", [0, 4]):
        with pytest.raises(ValueError, match="this machine has 4 of cuda"):
            check_trainer_options(cuda | {"devices": devices})
    with pytest.raises(ValueError, match="bf16-mixed is not for Tesla V100"):
        check_trainer_options(cuda | {"precision": "bf16-mixed"})
    with pytest.raises(ValueError, match="16-true can't train: .* use 16-mixed or bf16-true"):
        check_trainer_options(cuda | {"precision": "16-true"})
    assert check_trainer_options(cuda | {"precision": "16-true"}, command="validate") == 4
    with pytest.raises(ValueError, match="16-mixed scales losses, which FSDP2"):
        check_trainer_options(cuda | {"precision": "16-mixed", "strategy": "fsdp2"})
