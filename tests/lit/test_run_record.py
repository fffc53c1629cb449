"""run.json: complete, whole whenever the process is killed, counting through restarts, and naming what came before."""

import hashlib
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_fit import ROOT, STEPS, vision_encoder

import cli
from illume_lightning import provenance
from illume_lightning.data.store import MANIFEST, sha256
from illume_lightning.lit import power, run_file
from illume_lightning.lit.lineage import hash_input, input_records
from illume_lightning.lit.prepare_latents import prepare_latents
from illume_lightning.lit.run_record import KILLED
from illume_lightning.metric_values import read_values
from illume_lightning.run_json import identity, read_run_json


@pytest.fixture(scope="module")
def run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a vision encoder."""
    folder = tmp_path_factory.mktemp("records") / "vision_encoder"
    cli.main(vision_encoder(folder, shapes))
    return folder


@pytest.fixture
def record(run: Path) -> dict[str, Any]:
    return read_run_json(run)


def test_a_record_is_complete(run: Path, record: dict[str, Any], shapes: Path) -> None:
    assert (record["version"], record["status"]) == (1, "finished")
    assert record["command"][:2] == ["illume", "fit"]
    assert (record["steps"], record["max_steps"], record["samples"]) == (STEPS, STEPS, 4 * STEPS)
    assert record["seeds"] == {"seed_everything": 0, "data": 0}
    assert record["packages"]["torch"].startswith("2.")
    hardware = record["hardware"]
    assert hardware["accelerator"] == "cpu" and hardware["world_size"] == 1
    assert hardware["precision"] == "bf16-mixed" and hardware["threads"] == torch.get_num_threads()
    stores = {store["path"]: store["manifest_sha256"] for store in record["stores"]}
    assert stores == {str(shapes / name): sha256(shapes / name / MANIFEST) for name in ("train", "val")}
    assert record["peak_memory"]["host_bytes"] > 10**8
    assert record["energy"] == {"joules": None, "why": "no device that tells its power"}
    assert record["metrics"]["train/loss"] == read_values(run)[0]["train/loss"][STEPS - 1]
    (start,) = record["starts"]
    assert (start["from_step"], start["to_step"], start["ended"]) == (0, STEPS, "finished")
    assert 0 < start["seconds"] == record["seconds"] < 60


def test_the_configuration_is_the_saved_one(run: Path, record: dict[str, Any]) -> None:
    saved = run / record["config"]["path"]
    assert record["config"]["sha256"] == hashlib.sha256(saved.read_bytes()).hexdigest()
    assert record["config"]["resolved"] == yaml.safe_load(saved.read_text())


def test_weights_are_those_of_the_last_checkpoint(run: Path, record: dict[str, Any]) -> None:
    weights = record["weights"]
    state = torch.load(run / weights["checkpoint"], weights_only=True)["state_dict"]
    assert weights["tensors"].keys() == state.keys()
    assert weights["sha256"] == sha256(run / weights["checkpoint"])
    name = next(iter(state))
    changed = state | {name: state[name] + 1}
    assert run_file.weights_digest(state) == weights["digest"] != run_file.weights_digest(changed)
    digests = run_file.tensor_digests(changed)
    assert [key for key in state if digests[key] != weights["tensors"][key]] == [name]


def test_a_killed_run_leaves_a_whole_record_and_goes_on_in_it(
    run: Path, record: dict[str, Any], shapes: Path, tmp_path: Path
) -> None:
    words = vision_encoder(tmp_path / "run", shapes)
    killed = subprocess.run(
        [sys.executable, str(ROOT / "tests/lit/killed_fit.py"), "3", *words],
        cwd=tmp_path,
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = read_run_json(tmp_path / "run")
    assert (left["status"], left["steps"], left["samples"]) == ("running", 2, 8)
    assert left["starts"][0]["ended"] is None and left["weights"] is None
    cli.main(words)
    again = read_run_json(tmp_path / "run")
    assert [(s["from_step"], s["to_step"], s["ended"]) for s in again["starts"]] == [
        (0, 2, KILLED),
        (2, STEPS, "finished"),
    ]
    assert again["seconds"] == round(sum(start["seconds"] for start in again["starts"]), 1)
    assert again["samples"] == record["samples"] and again["identity"] == record["identity"]
    assert again["weights"]["digest"] == record["weights"]["digest"]
    assert again["series"]["sha256"] == record["series"]["sha256"]
    cli.main(words)
    assert len(read_run_json(tmp_path / "run")["starts"]) == 2, "a finished run is left alone"


def test_writing_replaces_the_record_as_a_whole(
    record: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_file.write_run_json(tmp_path, record | {"steps": 1})

    def stop(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", stop)
    with pytest.raises(OSError, match="No space"):
        run_file.write_run_json(tmp_path, record | {"steps": 2})
    assert read_run_json(tmp_path)["steps"] == 1


def test_an_unreadable_record_is_put_aside(
    shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{")
    cli.main(vision_encoder(tmp_path / "run", shapes, "--trainer.limit_val_batches=0"))
    assert len(read_run_json(tmp_path / "run")["starts"]) == 1
    assert (tmp_path / "run" / "run.json.unreadable").read_text() == "{"


def test_lineage_of_a_tokenizer_that_began_with_a_vision_encoder(
    run: Path, record: dict[str, Any], shapes: Path, tmp_path: Path
) -> None:
    """Vision encoder -> WarmStart -> tokenizer -> latents, each known by what made it."""
    start, folder = run / "checkpoints/last.ckpt", tmp_path / "tokenizer"
    config = yaml.safe_load((ROOT / "experiments/shapes/dualvitok.yaml").read_text())
    callbacks = [config["trainer"]["callbacks"][0], {"class_path": "callbacks.Checkpoint", "init_args": {}}]
    callbacks[0]["init_args"]["checkpoint"] = str(start)
    callbacks[1]["init_args"] = {"dirpath": str(folder / "checkpoints"), "save_last": True}
    overlay = tmp_path / "overlay.yaml"
    encoder = {"init_args": {"depth": 1, "width": 32}}
    model = {"init_args": {"semantic_encoder": {"init_args": {"model": encoder}}}}
    section = {"trainer": {"callbacks": callbacks}, "model": {"init_args": {"model": model}}}
    overlay.write_text(yaml.safe_dump(section))
    words = vision_encoder(folder, shapes)[5:]
    cli.main(["fit", "-c", str(ROOT / "experiments/shapes/dualvitok.yaml"), "-c", str(overlay), *words])
    made = read_run_json(folder)
    (warm_start,) = made["inputs"]
    assert warm_start["key"] == "trainer.WarmStart.checkpoint"
    assert (warm_start["path"], warm_start["sha256"]) == (str(start), sha256(start))
    assert (warm_start["global_step"], warm_start["bytes"]) == (STEPS, start.stat().st_size)
    assert warm_start["run"]["identity"] == record["identity"]
    assert warm_start["run"]["fingerprint"] == record["weights"]["fingerprint"]
    latents = {"side": 128, "space_to_depth": 4}
    (manifest,) = prepare_latents(str(shapes / "val"), tmp_path / "latents", str(folder), **latents).values()
    assert manifest.identity["tokenizer"] == made["weights"]["fingerprint"]
    (codes,) = input_records({"model": {"init_args": {"tokenizer": str(folder)}}})
    assert codes["key"] == "model.tokenizer" and codes["sha256"] == made["weights"]["sha256"]
    (first,) = codes["run"]["inputs"]
    assert first["run"]["identity"] == record["identity"], "two runs back"


def test_identity_stands_for_everything_but_the_place() -> None:
    config = {
        "trainer": {"default_root_dir": "runs/a", "logger": {"save_dir": "runs/a/logs"}, "max_steps": 3}
    }
    moved = {"trainer": {"default_root_dir": "b", "logger": {"save_dir": "b/logs"}, "max_steps": 3}}
    found = identity(config, "code", ["store"], ["input"])
    assert found == identity(moved, "code", ["store"], ["input"])
    longer = {"trainer": config["trainer"] | {"max_steps": 4}}
    others = [
        identity(longer, "code", ["store"], ["input"]),
        identity(config, "other", ["store"], ["input"]),
        identity(config, "code", [], ["input"]),
        identity(config, "code", ["store"], ["other"]),
    ]
    assert len({found, *others}) == 5


def test_inputs_that_did_not_change_are_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "qwen"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    config = {
        "trainer": {
            "callbacks": [{"class_path": "callbacks.StartFromQwen", "init_args": {"folder": str(folder)}}]
        }
    }
    config["model"] = {"pretrained": "Organisation/model"}
    records = input_records(config)
    assert [entry["key"] for entry in records] == ["trainer.StartFromQwen.folder", "model.pretrained"]
    assert records[0]["sha256"] == hash_input(folder) and records[1]["sha256"] is None
    monkeypatch.setattr("illume_lightning.lit.lineage.hash_input", None)
    assert input_records(config, records) == records
    monkeypatch.undo()
    (folder / "config.json").write_text("[1]")
    assert input_records(config, records)[0]["sha256"] != records[0]["sha256"]


def test_code_is_known_without_git_too(monkeypatch: pytest.MonkeyPatch) -> None:
    found = provenance.code()
    monkeypatch.setenv("PATH", "")
    alone = provenance.code()
    assert alone["source_sha256"] == found["source_sha256"]
    assert alone["commit"] is None and alone["why"].startswith("no git")
    assert provenance.commit_name(alone) is None
    assert provenance.commit_name({"commit": "0123456789abcdef", "diff_sha256": "a"}) == "0123456789ab-dirty"


def test_energy_is_power_times_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(power.time, "monotonic", lambda: now)
    monkeypatch.setattr(torch.cuda, "power_draw", lambda device: 250_000)
    monkeypatch.setitem(sys.modules, "pynvml", type(sys)("pynvml"))
    sys.modules["pynvml"].NVMLError = ZeroDivisionError  # type: ignore[attr-defined]
    meter = power.PowerMeter([torch.device("cuda", 0), torch.device("cuda", 1)])
    now += 4
    meter.sample()
    assert meter.joules is None, "looked too soon"
    now += 8
    meter.sample()
    assert meter.joules == pytest.approx(2 * 250 * 12)
    now += 1
    meter.sample(at_once=True)
    assert meter.joules == pytest.approx(2 * 250 * 13)
    assert meter.why is None


def test_every_key_is_documented(record: dict[str, Any]) -> None:
    named = set(re.findall(r"`([\w.]+)`", (ROOT / "docs/reproducibility.md").read_text()))
    assert sorted(_keys(json.loads(json.dumps(record))) - named) == []


def _keys(value: Any, place: str = "") -> set[str]:
    """Dotted names of all keys, but for dictionaries whose keys are names of other things."""
    names = ("config.resolved", "packages", "hardware.arithmetic", "weights.tensors", "metrics")
    if isinstance(value, list):
        return set().union(*(_keys(child, place) for child in value))
    if not isinstance(value, dict) or place in names:
        return set()
    found: set[str] = set()
    for key, child in value.items():
        name = f"{place}.{key}" if place else key
        found |= {name} | _keys(child, name)
    return found
