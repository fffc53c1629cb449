"""Days and cost of a run, from its YAML alone; wrong questions end in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from budget.models import decoder, mllm

import cli
from callbacks import ResolutionCurriculum
from illume_lightning.budget.devices import DEVICES, GIB
from illume_lightning.budget.dry_step import PRECISIONS, StepCost, tensor_bytes
from illume_lightning.budget.estimate import Hardware, estimate
from illume_lightning.budget.memory import ALLOWANCE, plan_memory, trained_bytes
from illume_lightning.budget.sample_batch import TEXT_TOKENS, sample_batch
from illume_lightning.budget.table import markdown, record
from illume_lightning.data.schedule import Phase

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SHAPES = EXPERIMENTS / "shapes"
STEP = StepCost(flops=0, kept=100, peak=1000)
OPTIONS: dict[str, Any] = {"averages": False, "accumulates": True}
FP32 = PRECISIONS["32-true"]


def test_days_and_cost_follow_from_the_products() -> None:
    hardware = Hardware(DEVICES["a100"], 2, "ddp", 0.25, price=3.0)
    found = estimate(
        [str(SHAPES / "dualvitok.yaml"), str(SHAPES.parents[1] / "tests/budget/halves.yaml")],
        hardware,
        ResolutionCurriculum,
    )
    first, last = found.phases
    assert (first.accumulation, last.accumulation) == (1, 2)
    assert first.steps == 60 and last.steps == 40
    for phase in found.phases:
        assert phase.seconds == pytest.approx(phase.flops / 2 / (312e12 * 0.25))
    assert found.days == pytest.approx((first.seconds * 60 + last.seconds * 40) / 86400)
    assert found.cost == pytest.approx(found.days * 24 * 2 * 3.0)
    assert found.fits and found.precision == "bf16-mixed"
    # 160 x 160 pictures have 2.04 times the area of 112 x 112, and there are twice as many.
    assert 3.5 < last.flops / first.flops < 4.6
    numbers = record(found)
    assert json.loads(json.dumps(numbers)) == numbers
    assert numbers["phases"][0]["memory"]["needed"] == first.memory.peak + ALLOWANCE
    assert "| pixel_decoder |" in markdown(found) and "Cost: 0." in markdown(found)


@pytest.mark.parametrize(
    "name",
    [
        *("vision_encoder", "diffusion_decoder", "mllm_stage1"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("dualvitok", "mllm_stage2", "mllm_stage3")),
    ],
)
def test_every_run_of_shapes_can_be_planned(name: str) -> None:
    hardware = Hardware(DEVICES["rtx4090"], 1, "ddp", 0.3)
    found = estimate([str(SHAPES / f"{name}.yaml")], hardware, ResolutionCurriculum)
    assert found.fits and 0 < found.days < 1
    assert (found.phases[0].tokens is not None) == name.startswith("mllm")


def test_memory_of_several_devices() -> None:
    module = mllm()
    whole, trained = tensor_bytes(module), trained_bytes(module)
    alone = plan_memory(module, STEP, 1, "ddp", FP32, **OPTIONS)
    ddp = plan_memory(module, STEP, 4, "ddp", FP32, **OPTIONS)
    sharded = plan_memory(module, STEP, 4, "fsdp2", FP32, **OPTIONS)
    assert (alone.weights, alone.gradients, alone.optimizer) == (whole, trained, 2 * trained)
    assert alone.buckets == 0 and ddp.buckets == trained and ddp.peak == alone.peak + trained
    assert sharded.weights == whole // 4 and sharded.optimizer == trained // 2 and sharded.buckets == 0
    assert 0 < sharded.gathered < whole
    fixed = sum(tensor_bytes(network) for network in module.fixed.values())
    assert alone.fixed == sharded.fixed == fixed > 0
    there = whole + fixed + 3 * trained
    assert alone.peak == there + max(STEP.peak, trained)  # the step, or all parameters' update at once


def test_an_average_is_one_more_copy() -> None:
    module = decoder()
    plain = plan_memory(module, STEP, 1, "ddp", FP32, **OPTIONS)
    averaged = plan_memory(module, STEP, 1, "ddp", FP32, averages=True, accumulates=True)
    assert averaged.peak - plain.peak == averaged.average == tensor_bytes(module)


@pytest.mark.parametrize(
    ("optimizer", "moments"),
    [
        (lambda groups: torch.optim.AdamW(groups), 2),
        (lambda groups: torch.optim.AdamW(groups, amsgrad=True), 3),
        (lambda groups: torch.optim.SGD(groups, momentum=0.9), 1),
        (lambda groups: torch.optim.SGD(groups), 0),
    ],
)
def test_moments_are_those_of_the_optimizer(optimizer: Any, moments: int) -> None:
    module = mllm(optimizer=optimizer)
    memory = plan_memory(module, STEP, 1, "ddp", FP32, **OPTIONS)
    assert memory.optimizer == moments * trained_bytes(module)


def test_muon_keeps_one_moment_of_matrices() -> None:
    module = mllm(matrix_optimizer=lambda groups: torch.optim.Muon(groups))
    matrices = sum(p.nbytes for p in module.model.trunk.parameters() if p.ndim == 2)
    memory = plan_memory(module, STEP, 1, "ddp", FP32, **OPTIONS)
    assert memory.optimizer == 2 * (trained_bytes(module) - matrices) + matrices


def test_fused_updates_need_no_copy() -> None:
    apart, fused = (
        plan_memory(
            mllm(optimizer=lambda groups, f=fused: torch.optim.AdamW(groups, fused=f)),
            StepCost(0, 0, 0),
            1,
            "ddp",
            FP32,
            **OPTIONS,
        ).peak
        for fused in (False, True)
    )
    assert apart - fused == trained_bytes(mllm())


def test_conversations_are_packed_as_in_training() -> None:
    module = mllm()
    batch = sample_batch(module, Phase(1, "fixed", 64, 4, 4), {"row_tokens": 512, "train": None}, None)
    pictures = 4 * 4 + 2 * 2 + 4 + 2 + 6  # codes, ends of lines, markers
    length = 2 * pictures + 2 + TEXT_TOKENS
    assert batch.ids.shape == (2, 2 * length) and int(batch.document_ids.max()) == 3
    assert len(batch.target_positions) == 4 * (2 + pictures + TEXT_TOKENS // 2)
    assert [tuple(images.shape) for images in (*batch.images, *batch.target_images)] == [(4, 3, 64, 64)] * 2
    cached = sample_batch(
        module, Phase(1, "fixed", 64, 4, 4), {"row_tokens": 512, "train": {"a": {"tokens": ["x"]}}}, None
    )
    assert cached.target_images == []
    alone = sample_batch(module, Phase(1, "fixed", 64, 1, 1), {"row_tokens": 180, "train": None}, None)
    assert alone.images == [] and alone.ids.shape == (1, length - pictures)
    with pytest.raises(ValueError, match="row_tokens 100 is too short"):
        sample_batch(module, Phase(1, "fixed", 64, 1, 1), {"row_tokens": 100, "train": None}, None)


def fails(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", *args])
    assert stop.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("illume plan: error: ")
    return last


RUN = str(SHAPES / "dualvitok.yaml")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([RUN, "--devices", "1", "--device", "h1000"], ["h1000", "h100, h200", "910b"]),
        ([RUN, "--devices", "0", "--device", "h100"], ["devices is 0", "at least 1"]),
        ([RUN, "--devices", "1", "--device", "h100", "--mfu", "40"], ["mfu is 40", "0.4"]),
        ([RUN, "--devices", "1", "--device", "h100", "--price=-1"], ["price is -1"]),
        ([RUN, "--devices", "3", "--device", "h100"], ["batch_size of 8", "3 processes"]),
        ([RUN, "--devices", "4", "--device", "h100"], ["micro_batch_size of 8", "use 2"]),
        ([RUN, "--devices", "8", "--device", "h100", "--strategy", "fsdp2"], ["DualViTokModule", "use ddp"]),
        ([str(SHAPES / "gone.yaml"), "--devices", "1", "--device", "h100"], ["gone.yaml"]),
        (
            ["-c", str(EXPERIMENTS / "hardware/cuda.yaml"), "--devices", "1", "--device", "h100"],
            ["has no model"],
        ),
    ],
)
def test_a_wrong_question_ends_in_one_line(
    args: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = fails(args, capsys)
    assert all(text in line for text in expected), line


def test_weights_in_half_precision_are_planned_or_refused_as_in_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "small.yaml"
    phases = [{"until_step": 5, "mode": "fixed", "side": 64, "batch_size": 2, "micro_batch_size": 1}]

    def words(name: str, precision: str) -> list[str]:
        file.write_text(
            yaml.safe_dump({"trainer": {"precision": precision}, "curriculum": {"phases": phases}})
        )
        return [str(SHAPES / f"{name}.yaml"), str(file)]

    hardware = Hardware(DEVICES["h100"], 1, "ddp", 0.4)
    plans = [
        estimate(words("dualvitok", p), hardware, ResolutionCurriculum) for p in ("bf16-mixed", "bf16-true")
    ]
    mixed, half = (plan.largest.memory for plan in plans)
    assert half.weights == pytest.approx(mixed.weights / 2, rel=0.01)
    assert half.fixed == mixed.fixed and half.peak < 0.7 * mixed.peak
    for name, precision, expected in (
        ("dualvitok", "16-true", "16-true can't train"),
        ("diffusion_decoder", "bf16-true", "EMAWeightAveraging keeps an average in fp32"),
    ):
        line = fails([*words(name, precision), "--devices", "1", "--device", "h100"], capsys)
        assert expected in line


def test_a_step_that_fails_says_with_what(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("expected BFloat16 but found Float\nException raised from x.cpp")

    monkeypatch.setattr("illume_lightning.lit.dualvitok.DualViTokModule.training_step", fail)
    hardware = Hardware(DEVICES["h100"], 1, "ddp", 0.4)
    with pytest.raises(ValueError, match="DualViTokModule fails with bf16-mixed: expected BFloat16.* Float$"):
        estimate([RUN], hardware, ResolutionCurriculum)


def test_the_command_prints_tables_and_writes_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overlay = tmp_path / "one_phase.yaml"
    phases = [{"until_step": 5, "mode": "fixed", "side": 64, "batch_size": 2, "micro_batch_size": 1}]
    overlay.write_text(
        yaml.safe_dump({"trainer": {"precision": "32-true"}, "curriculum": {"phases": phases}})
    )
    file = tmp_path / "plan.json"
    cli.main(["plan", RUN, "-c", str(overlay), "--devices", "2", "--device", "l40s", "--json", str(file)])
    printed = capsys.readouterr().out
    assert printed.startswith("2 x NVIDIA L40S 48 GB, ddp, 32-true, MFU 0.4\n")
    assert "| 0: fixed 64 px | 5 | 2 = 2 x 1 x 1 |" in printed
    assert "no days for 32-true" in printed
    numbers = json.loads(file.read_text())
    assert numbers["days"] is None and numbers["fits"] is True
    assert numbers["phases"][0]["memory"]["peak"] < GIB
