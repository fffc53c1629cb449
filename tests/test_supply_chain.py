"""What is installed is what was tested, comes from the index alone, and talks to nobody unless asked to."""

import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import cli
import illume_lightning.lit
from illume_lightning import doctor
from illume_lightning.releases import COMPROMISED

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIREMENTS = [
    *map(Requirement, [*PROJECT["dependencies"], *(text for extra in EXTRAS.values() for text in extra)])
]
LINES = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
PINS = {canonicalize_name(name): version for name, version in (line.split("==") for line in LINES)}
NOT_PINNED = {
    "torch-npu": "it wants another torch than the tested one",
    "lmms-eval": "it wants another protobuf than the tested one",
}


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_every_dependency_is_pinned_within_its_range(requirement: Requirement) -> None:
    assert requirement.url is None, "an index is the only source"
    name = canonicalize_name(requirement.name)
    assert (name in PINS) != (name in NOT_PINNED)
    assert name in NOT_PINNED or requirement.specifier.contains(PINS[name])


def test_pins_are_exact_and_from_the_index() -> None:
    assert len(PINS) == len(LINES) > 100
    for line in LINES:
        assert Requirement(line).url is None, line
        (specifier,) = Requirement(line).specifier
        assert specifier.operator == "==" and not specifier.version.endswith("*"), line


def test_direct_dependencies_are_the_tested_versions() -> None:
    """Where `make setup` made the environment; others are free to run what pyproject.toml allows."""
    direct = {canonicalize_name(requirement.name) for requirement in REQUIREMENTS} - set(NOT_PINNED)
    found = {}
    for name in direct:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            assert not any(
                canonicalize_name(Requirement(text).name) == name for text in PROJECT["dependencies"]
            )
    others = {name: version for name, version in found.items() if version != PINS[name]}
    if others and not Path(sys.prefix, ".installed").is_file():
        pytest.skip(f"not the tested versions: {others}")
    assert others == {}
    assert len(found) > 20


@pytest.fixture
def compromised(monkeypatch: pytest.MonkeyPatch) -> None:
    read = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "2.6.3" if name == "lightning" else read(name)
    )


def test_compromised_releases_are_excluded() -> None:
    ranges = {requirement.name: requirement.specifier for requirement in REQUIREMENTS}
    assert COMPROMISED["lightning"] == ("2.6.2", "2.6.3")
    for package, versions in COMPROMISED.items():
        for version in versions:
            assert not ranges[package].contains(version)
            # Also if the lower bound is ever moved down.
            assert f"!={version}" in str(ranges[package])


@pytest.mark.parametrize(
    "command", [["fit", "-c", "x.yaml"], ["generate", "run", "out", "a star"], ["plan", "x.yaml"]]
)
def test_compromised_releases_are_refused(
    command: list[str], compromised: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(command)
    assert stop.value.code == 2
    line = f"illume {command[0]}: error: lightning 2.6.3 is a compromised release, and illume ran nothing of it: "
    assert capsys.readouterr().err.startswith(line)


def test_doctor_and_python_say_so_too(compromised: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert "2.6.3  COMPROMISED RELEASE: upgrade at once" in doctor.report()
    with pytest.raises(ImportError, match="lightning 2.6.3 is a compromised release"):
        importlib.reload(illume_lightning.lit)


def audited(*packages: dict[str, Any]) -> str:
    return json.dumps({"dependencies": packages, "fixes": []})


CLEAN = {"name": "a", "version": "1", "vulns": []}
SKIPPED = {"name": "b", "skip_reason": "Dependency not found on PyPI and could not be audited: b (2)"}
HURT = {"name": "c", "version": "3", "vulns": [{"id": "CVE-1", "fix_versions": ["4"]}]}


@pytest.mark.parametrize(
    ("report", "status", "said"),
    [
        (audited(CLEAN), 0, "1 of 1 packages audited, 0 of them vulnerable, 0 not audited"),
        (audited(CLEAN, SKIPPED), 2, "1 of 2 packages audited, 0 of them vulnerable, 1 not audited"),
        (audited(SKIPPED), 2, "NOT AUDITED b: Dependency not found on PyPI"),
        (audited(CLEAN, SKIPPED, HURT), 1, "c 3: CVE-1, fixed in 4"),
        (audited(), 2, "0 of 0 packages audited"),
        ("", 2, "NOT AUDITED: pip-audit left no report"),
        (None, 2, "NOT AUDITED: pip-audit left no report"),
    ],
)
def test_what_was_not_audited_is_not_called_safe(
    report: str | None, status: int, said: str, tmp_path: Path
) -> None:
    if report is not None:
        (tmp_path / "report.json").write_text(report)
    command = [sys.executable, str(ROOT / ".ci/audit.py"), str(tmp_path / "report.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert said in done.stdout


@pytest.fixture
def asked(tmp_path: Path) -> Callable[[str], list[str]]:
    """Runs Python code, and all processes that it starts, without a network; returns the machines asked for."""
    log = tmp_path / "asked"
    log.touch()
    paths = [ROOT / "tests/without_network", ROOT / "tests", ROOT]
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("HF_", "GRADIO_", "DO_NOT"))
    }
    environment = kept | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "NETWORK_LOG": str(log)}
    environment |= {"OMP_NUM_THREADS": "1", "ILLUME_ALLOW": "tiny,tiny_mllm"}

    def run(code: str) -> list[str]:
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return log.read_text().splitlines()

    return run


def test_the_guard_sees_who_asks(asked: Callable[[str], list[str]]) -> None:
    code = """
import socket, urllib.request, urllib.error
from multiprocessing import get_context

def ask(address):
    try:
        urllib.request.urlopen(f"http://{address}", timeout=1)
    except urllib.error.URLError as error:
        assert "no network" in str(error)

if __name__ == "__main__":
    ask("by-name.example")
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(("127.0.0.1", 9))
    try:
        socket.socket().connect(("192.0.2.1", 80))
    except OSError:
        pass
    worker = get_context("fork").Process(target=ask, args=("of-a-forked-worker.example",))
    worker.start()
    worker.join()
"""
    assert asked(code) == ["by-name.example", "192.0.2.1", "of-a-forked-worker.example"]


SMOKE = f"""
import sys
from pathlib import Path
import illume_lightning, callbacks, cli

if __name__ == "__main__":
    cli.main(["doctor"])
    for split, count in (("train", "16"), ("val", "4")):
        cli.main(["prepare", "shapes", f"data/{{split}}", "--split", split, "--count", count, "--sizes", "[[64,64]]"])
    run = ["-c", {str(ROOT / "experiments/shapes/vision_encoder.yaml")!r}, "--trainer.max_steps=2"]
    run += ["--curriculum.phases=[{{until_step: 2, mode: fixed, side: 64, batch_size: 4, micro_batch_size: 4}}]"]
    run += ["--trainer.val_check_interval=2", "--data.num_workers=1", "--trainer.default_root_dir=run"]
    run += ["--data.train=[{{path: data/train}}]", "--data.val={{shapes: data/val}}", "--data.val_sizes=[64]"]
    cli.main(["fit", *run])
    cli.main(["validate", *run])
    from illume_lightning.data.text_tokenizer import TextTokenizer
    from illume_lightning.data.worlds.shapes_conversations import prepare_shapes_tokenizer
    from tiny_run import write_dualvitok_run, write_mllm_run
    prepare_shapes_tokenizer("words")
    dualvitok = write_dualvitok_run(Path("tokenizer"))
    write_mllm_run(Path("mllm"), TextTokenizer("words"), dualvitok)
    small = ["--slots=2", "--context=512", "--device=cpu"]
    cli.main(["generate", "mllm", "out", "a star", "--tokenizer", "tokenizer", "--max_tokens=8", *small])
    assert list(Path("out").rglob("*.png"))
    import socket
    from illume_lightning import Illume
    from illume_lightning.app.examples import Examples
    from illume_lightning.app.page import Server, build_page
    from illume_lightning.app.studio import Studio
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    page = build_page(Studio(Illume.load("mllm", "tokenizer", None, "cpu")), Examples())
    Server(port=port).open(page)
    page.close()
"""


def test_nothing_asks_for_the_network(asked: Callable[[str], list[str]]) -> None:
    """Import, doctor, data, training with a worker, validation, generation and the web page."""
    assert asked(SMOKE) == []
