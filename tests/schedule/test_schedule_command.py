"""`illume schedule` on the command line: outlook, scripts, help and what is seen while it runs."""

import os
import pty
import re
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest
from toy_world import PROGRAM, edit

import cli
from illume_lightning.schedule.display import duration, last_line, table, tail

ROOT = Path(__file__).parents[2]


def files(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_dry_run_writes_nothing(
    do: Callable[..., int], world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(world)
    assert do("--dry-run") == 0
    assert files(world) == before
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].split() == ["step", "state", "minutes", "command"]
    assert rows[1].split() == ["1", "pictures", "waiting", "0.2", "prepare", "data/toy/train", "8"]
    assert rows[3].split()[:4] == ["3", "tokenizer", "waiting", "?"]
    assert rows[-1] == "left: 6 min 12 s, and 2 steps of unknown length"
    do("--until", "pictures")
    assert do("--", "--fails_at", "12") == 1
    before = files(world)
    capsys.readouterr()
    assert do("--dry-run", "--", "--fails_at", "12") == 0
    states = [row.split()[2] for row in capsys.readouterr().out.splitlines()[1:5]]
    assert states == ["finished", "continues", "waiting", "waiting"]
    edit(world / "encoder.yaml", rate=2)
    assert do("--dry-run", "--until", "encoder", "--", "--fails_at", "12") == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[2].split()[2] == "changed"
    assert "encoder: encoder.yaml has changed since it was begun\n" in printed
    assert printed.splitlines()[-1] == "left: 6 min 00 s"
    assert files(world).keys() == before.keys()


@pytest.mark.parametrize("kind", ["plain", "torchrun", "slurm"])
def test_printed_scripts_run(
    kind: str, world: Path, do: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """With stand-ins for illume, torchrun, sbatch and srun that write down what they are given."""
    assert (
        do("--seed", "4", "--print", kind, "--from", "encoder", "--", "--data.train", "[{path: it's here}]")
        == 0
    )
    script = capsys.readouterr().out
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    tools = world / "tools"
    tools.mkdir()
    for name in ("illume", "torchrun", "srun"):
        text = f'#!/bin/bash\nprintf "%s|" {name} "$@" >>calls; echo >>calls\n[ {name} != srun ] || "$@"\n'
        (tools / name).write_text(text)
    wrap = 'printf "%s|" sbatch "$@" >>calls; echo >>calls; bash -c "${@: -1}" >&2; wc -l <calls\n'
    (tools / "sbatch").write_text("#!/bin/bash\n" + wrap)
    for tool in tools.iterdir():
        tool.chmod(0o755)
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "GPUS": "2"}
    subprocess.run(["bash"], input=script, text=True, check=True, env=environment)
    calls = [line.rstrip("|").split("|") for line in Path("calls").read_text().splitlines()]
    fits = [
        call
        for call in calls
        if call[0] == ("torchrun" if kind == "torchrun" else "illume") and "fit" in call
    ]
    assert [call[call.index("-c") + 1] for call in fits] == ["encoder.yaml", "tokenizer.yaml"]
    for call in fits:
        assert call[call.index("--data.train") + 1] == "[{path: it's here}]"
        assert call[call.index("--seed_everything") + 1] == "4"
        assert ("--trainer.devices" in call) == (kind != "plain")
    assert calls[-1] == ["illume", "evaluate", "runs/toy/tokenizer/seed4"]
    if kind == "torchrun":
        assert fits[0][1:3] == ["--nproc_per_node", "2"]
        assert fits[0][fits[0].index("-m") :][:3] == ["-m", "cli", "fit"]
    if kind == "slurm":
        jobs = [call for call in calls if call[0] == "sbatch"]
        waits = [[word for word in job if word.startswith("--dependency")] for job in jobs]
        assert waits == [[], ["--dependency=afterok:3"], ["--dependency=afterok:6"]]
        assert fits[0][-4:] == ["--trainer.devices", "2", "--trainer.num_nodes", "1"]


def test_a_launcher_starts_the_fits(do: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert do("--print", "plain", "--launcher", "torchrun --nproc_per_node 2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "torchrun --nproc_per_node 2 -m cli fit -c encoder.yaml --seed_everything 0" in lines
    assert "illume prepare data/toy/train 8" in lines
    assert do("--until", "pictures", "--launcher", "no-such-launcher") == 0
    with pytest.raises(FileNotFoundError, match="no-such-launcher"):
        do("--until", "encoder", "--launcher", "no-such-launcher")


def test_a_bar_on_a_terminal_and_lines_elsewhere(world: Path) -> None:
    code = f"import cli\nfrom illume_lightning.schedule import command\ncommand.main(['schedule.yaml'], {PROGRAM!r})"
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    seen = b""
    while True:
        try:
            seen += os.read(ours, 4096)
        except OSError:  # Linux: the other side is closed
            break
    table_, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert b"[3/4] tokenizer" in seen and b"min, phase 1/1" in seen and b"9.8it/s" in seen
    assert max(len(line) for line in re.split(r"[\r\n]", seen.decode())) <= 100
    assert b"####" not in seen, "no bar within the bar"
    assert "total" in table_.decode()
    edit(world / "tokenizer.yaml", rate=2)
    code = code.replace("'schedule.yaml'", "'schedule.yaml', '--redo'")
    code = "import logging\nlogging.basicConfig(level=logging.INFO, format='%(message)s')\n" + code
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = shown.stderr.splitlines()
    assert lines[0] == "[3/4] tokenizer: starts"
    assert re.fullmatch(r"\[3/4\] tokenizer: finished after \d+ s", lines[1])
    assert len(lines) == 4


def test_lines_of_logs(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    assert last_line(log) == ""
    log.write_text(
        "begun\n\rphase 1/3:  10%|#    | 30/300 [00:03<00:30, 9.8it/s]\r\x1b[Aphase 1/3:  12%|#    | 36/300\n\n"
    )
    assert last_line(log) == "phase 1/3 36/300"
    assert tail(log, 5) == ["begun", "phase 1/3:  12%|#    | 36/300"]
    log.write_bytes(b"x" * 100_000 + b"\nlast \xff\n")
    assert last_line(log) == "last \ufffd"
    assert [duration(s) for s in (5.4, 65, 3599.6, 3 * 3600 + 61)] == [
        "5 s",
        "1 min 05 s",
        "1 h 00 min",
        "3 h 01 min",
    ]
    assert table([("a", "bb"), ("ccc", "")]) == "a    bb\nccc\n"


def test_help_and_errors_start_at_once(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import sys, cli\ntry: cli.main(['schedule'])\nexcept SystemExit as stop: assert not stop.code\n"
        "assert not {'torch', 'lightning', 'litdata', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--redo" in done.stdout
    for args, expected in (
        (["gone.yaml"], "there is no file gone.yaml"),
        (["schedule.yaml", "--from", "x"], "there is no step 'x'"),
        (["schedule.yaml", "--redo", "--keep"], "not allowed with"),
        (["schedule.yaml", "--unti", "x"], "unrecognized arguments: --unti x"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["schedule", *args])
        assert stop.value.code == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("illume schedule: error: ") and expected in last
