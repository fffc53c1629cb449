"""Every run of the paper is planned at full size, with nothing but its YAML."""

from pathlib import Path

import pytest
import yaml

from callbacks import ResolutionCurriculum
from illume_lightning.budget.devices import DEVICES
from illume_lightning.budget.estimate import Estimate, Hardware, estimate

PAPER = Path(__file__).parents[2] / "experiments/paper"
TOKENIZER = ("tokenizer (fixed)", 0, 1_345_978_979)
PARTS = {
    "dualvitok": {
        ("semantic_encoder", 83_339_552, 675_759_104),
        ("semantic_decoder", 83_350_272, 0),
        ("pixel_encoder", 27_159_264, 0),
        ("pixel_decoder", 476_363_523, 0),
        ("discriminator", 2_765_633, 0),
        ("perceptual (fixed)", 0, 14_714_688 + 1_472),
    },
    "diffusion_decoder": {("unet", 2_567_463_684 + 64 * 320 * 9, 0), ("latents", 0, 83_653_863), TOKENIZER},
    "mllm_stage1": {("trunk", 0, 2_774_773_760), ("semantic_encoder", 0, 675_759_104), TOKENIZER},
    "mllm_stage2": {("trunk", 2_774_773_760, 0), ("pixel_encoder", 0, 27_159_264), TOKENIZER},
    "mllm_stage3": {("trunk", 2_774_773_760, 0), ("pixel_encoder", 10_647_072, 16_512_192), TOKENIZER},
}


def plan(name: str, folder: Path, strategy: str = "ddp") -> Estimate:
    """The last phase with micro-batches of one."""
    phase = yaml.safe_load((PAPER / f"{name}.yaml").read_text())["curriculum"]["phases"][-1]
    overlay = folder / "small.yaml"
    overlay.write_text(yaml.safe_dump({"curriculum": {"phases": [phase | {"micro_batch_size": 1}]}}))
    hardware = Hardware(DEVICES["h100"], 8, strategy, 0.4, price=2.0)  # type: ignore[arg-type]
    return estimate([str(PAPER / f"{name}.yaml"), str(overlay)], hardware, ResolutionCurriculum)


@pytest.mark.parametrize("name", PARTS)
def test_parameters_are_the_published_ones(name: str, tmp_path: Path) -> None:
    found = plan(name, tmp_path)
    assert {(part.name, part.trained, part.frozen) for part in found.parts} >= PARTS[name]
    trained = sum(part.trained for part in found.parts)
    assert found.phases[0].memory.optimizer == pytest.approx(8 * trained, rel=1e-6)
    assert found.cost == pytest.approx(found.days * 24 * 8 * 2.0)


def test_sharding_makes_room(tmp_path: Path) -> None:
    found = plan("mllm_stage3", tmp_path, "fsdp2")
    memory, trained = found.phases[0].memory, sum(part.trained for part in found.parts)
    assert found.fits and memory.optimizer == pytest.approx(trained, rel=1e-6)  # 8 bytes on 8 devices
    assert memory.peak < 40 * 2**30 < 8 * (memory.weights + memory.gradients + memory.optimizer)


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
def test_the_paper_as_it_is(name: str) -> None:
    hardware = Hardware(DEVICES["h100"], 8, "ddp", 0.4)
    found = estimate([str(PAPER / f"{name}.yaml")], hardware, ResolutionCurriculum)
    assert 0 < found.days < 1000
