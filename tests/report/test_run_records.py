"""Records of runs in a report: a line each, and a word where there is none."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="curves need matplotlib: pip install 'illume-lightning[report]'")

from toy_records import write_json

from illume_lightning.report.page import write_report
from illume_lightning.report.run_records import read_run_row


def run_json(**changes: Any) -> dict[str, Any]:
    """As `illume fit` writes it."""
    record: dict[str, Any] = {
        "version": 1,
        "identity": "fedcba9876543210",
        "status": "finished",
        "config": {},
    }
    record |= {
        "code": {"commit": "0123456789abcdef", "diff_sha256": "ab", "source_sha256": "cd", "why": None}
    }
    record |= {
        "seeds": {"seed_everything": 3, "data": 3},
        "python": "3.11.7",
        "packages": {"torch": "2.14.1"},
    }
    host = {"cpu": "EPYC", "threads": 2, "world_size": 1, "precision": "bf16-mixed", "devices": ["cpu"]}
    record |= {"hardware": host, "stores": [], "inputs": [], "steps": 1800, "max_steps": 1800}
    record |= {"samples": 28800, "seconds": 125.0, "starts": [{}, {}, {}], "series": None, "weights": None}
    return record | {"peak_memory": {"host_bytes": 3 * 2**30, "device_bytes": None}} | changes


def test_records_stand_in_the_report_and_gaps_are_named(folder: Path, root: Path) -> None:
    write_json(root / "runs/toys/dualvitok/seed3/run.json", run_json())
    write_json(root / "runs/toys/mllm_stage1/seed3/run.json", run_json(starts="none"))
    (root / "runs/toys/mllm_stage2/seed3/run.json").write_text("{")
    html, markdown = (path.read_text() for path in write_report(folder))
    row = next(line for line in markdown.splitlines() if line.startswith("| DualViTok | finished"))
    cells = [cell.strip().replace("\u00a0", " ") for cell in row.strip("|").split("|")]
    assert cells[:6] == ["DualViTok", "finished", "0123456789ab-dirty", "fedcba9876543210", "3", "1,800"]
    assert cells[6:10] == ["28,800", "2 min 5 s", "2", "3.0 GiB host"]
    assert cells[10:] == ["EPYC, 2 threads, bf16-mixed", "Python 3.11.7, torch 2.14.1"]
    assert "0123456789ab-dirty" in html and "EPYC, 2 threads, bf16-mixed; Python 3.11.7" in html
    for text in (html.replace("&#39;", "'"), markdown.replace("\\", "")):
        assert "'starts' is 'none', not a list" in text
        assert "run.json is not readable JSON" in text
        assert "runs/toys/mllm_stage3/seed3 has no run.json" in text


def test_devices_are_counted(tmp_path: Path) -> None:
    gpus = {"cpu": "EPYC", "threads": 8, "world_size": 4, "precision": "32-true", "devices": ["H100", "H100"]}
    peak = {"host_bytes": 2**30, "device_bytes": 5 * 2**29}
    code = {"commit": None, "diff_sha256": None}
    write_json(tmp_path / "run.json", run_json(hardware=gpus, peak_memory=peak, code=code, samples=None))
    row = read_run_row(tmp_path)
    assert row.hardware == "2 x H100, 4 processes, 32-true"
    assert row.memory.replace("\u00a0", " ") == "1.0 GiB host, 2.5 GiB device"
    assert (row.commit, row.samples) == ("no git", "\u2013")
