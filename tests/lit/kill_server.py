"""Runs the real command in forked children, and kills them: importing everything takes seconds, a fork none.

Run as a script. Every line on standard input is one `Job` in JSON, answered by a line in JSON. What happens in a run
is a list of events, such as "gradients 3.1" (of micro-batch 1 of training step 3), the same ones in every run; a child
says when the one that it is to be killed at has come.
"""

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Kill:
    """When a run is killed."""

    event: str | None = None
    """At this event; none is at a time."""

    seconds: float | None = None
    """After the event or the start; without them the run waits at the event for its death."""


@dataclass(frozen=True)
class Job:
    """One start of a run."""

    folder: str
    """Working directory."""

    args: tuple[str, ...]
    """Of the `illume` command."""

    kill: Kill | None = None
    """None lets it end."""

    trace: str | None = None
    """File to write all events to."""

    mutation: str | None = None
    """`module:function` to call before the command, which breaks something."""


class Events:
    """Reports from within a run."""

    def __init__(self, wanted: Kill | None, pipe: int) -> None:
        self.wanted, self.pipe = wanted, pipe
        self.seen: list[str] = []
        self.saves = 0
        self.place = ""
        self.is_saving = ""

    def __call__(self, name: str) -> None:
        self.seen.append(name)
        if self.wanted is not None and self.wanted.event == name:
            self.wanted, wanted = None, self.wanted
            os.write(self.pipe, b"!")
            if wanted.seconds is None:
                time.sleep(60)  # in vain

    def file_operation(self, audited: str, args: tuple[Any, ...]) -> None:
        """Python tells of every one, whoever writes checkpoints, and however."""
        if not self.is_saving:
            return
        is_write = audited == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
        if is_write or audited in ("os.rename", "os.remove", "os.link", "os.symlink", "os.truncate"):
            self.saves += 1
            self(f"save {self.is_saving} {self.saves}")


def watch(events: Events) -> None:
    """Have a run report what happens in it."""
    import lightning as L
    from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
    from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector

    from callbacks import Checkpoint, ResolutionCurriculum
    from illume_lightning.lit import training

    def place(module: Any) -> str:
        events.place = f"{module.global_step}.{module.micro_batch}"
        return events.place

    Module = training.TrainingModule
    after(ResolutionCurriculum, "on_train_batch_start", lambda _, __, m, *a: events(f"batch {place(m)}"))
    before(Module, "backward_micro_batch", lambda m, *a, **o: events(f"forward {place(m)}"))
    before(Module, "step_optimizers", lambda m, *a: events(f"gradients {place(m)}"))
    before(Module, "step_schedules", lambda m: events(f"stepped {place(m)}"))
    before(training, "_rescale", lambda *a: events(f"between {events.place}"))
    before(
        _EvaluationLoop, "_evaluation_step", lambda v, b, i, d, *a: events(f"validation {step(v)}.{d}.{i}")
    )
    before(_EvaluationLoop, "_on_evaluation_end", lambda v: events(f"validated {step(v)}"))
    after(_LoggerConnector, "log_metrics", lambda c, *a, **o: events(f"logged {c.trainer.global_step}"))
    before(L.Trainer, "_teardown", lambda *a: events("end 0"))
    for name in ("_save_topk_checkpoint", "_save_last_checkpoint"):
        setattr(Checkpoint, name, during(getattr(Checkpoint, name), events, name.split("_")[2]))
    sys.addaudithook(events.file_operation)


def step(loop: Any) -> int:
    return loop.trainer.global_step


def during(save: Callable[..., None], events: Events, name: str) -> Callable[..., None]:
    """Has file operations reported while a checkpoint is saved."""

    def saving(callback: Any, trainer: Any, *args: Any) -> None:
        events.saves, events.is_saving = 0, f"{trainer.global_step}.{name}"
        events(f"save {events.is_saving} 0")
        save(callback, trainer, *args)
        events.is_saving = ""

    return saving


def before(owner: Any, name: str, report: Callable[..., None]) -> None:
    function = getattr(owner, name)

    def reporting(*args: Any, **options: Any) -> Any:
        report(*args, **options)
        return function(*args, **options)

    setattr(owner, name, reporting)


def after(owner: Any, name: str, report: Callable[..., None]) -> None:
    function = getattr(owner, name)

    def reporting(*args: Any, **options: Any) -> Any:
        result = function(*args, **options)
        report(*args, **options)
        return result

    setattr(owner, name, reporting)


def run(job: Job, pipe: int) -> None:
    """The command, in a child, which does not come back."""
    import cli

    status = 1
    try:
        os.chdir(job.folder)
        output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        events = Events(job.kill, pipe)
        watch(events)
        if job.mutation is not None:
            module, function = job.mutation.split(":")
            getattr(importlib.import_module(module), function)()
        cli.main([*job.args, "--traceback"])
        if job.trace is not None:
            Path(job.trace).write_text("\n".join(events.seen))
        status = 0
    finally:
        if status:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve(job: Job) -> dict[str, Any]:
    """Fork, wait, kill."""
    began = time.monotonic()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        run(job, writer)
    os.close(writer)
    kill = job.kill
    if kill is not None:
        at_time = kill.event is None
        came, _, _ = select.select([reader], [], [], kill.seconds if at_time else None)
        if not came or (os.read(reader, 1) and not at_time):
            time.sleep(0 if at_time else kill.seconds or 0)
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(reader)
    killed = os.WIFSIGNALED(status)
    return {
        "killed": killed,
        "status": None if killed else os.WEXITSTATUS(status),
        "seconds": time.monotonic() - began,
    }


class Server:
    """A server in a process of its own."""

    def __init__(self, paths: list[Path]) -> None:
        given = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", __file__]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, env={**os.environ, **given}, **pipes)

    def run(self, job: Job) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(asdict(job)) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


def main() -> None:
    import torch
    from lightning.pytorch.cli import LightningCLI  # noqa: F401

    import illume_lightning.lit.cli
    import illume_lightning.lit.conversation_data
    import illume_lightning.lit.diffusion_decoder
    import illume_lightning.lit.vision_encoder  # noqa: F401

    for name in ("torch.utils.tensorboard", "litdata", "peft", "tiny", "tiny_mllm", "killed_runs"):
        importlib.import_module(name)
    torch.set_num_threads(1)
    for line in sys.stdin:
        given = json.loads(line)
        kill = None if given["kill"] is None else Kill(**given["kill"])
        answer = serve(Job(**(given | {"kill": kill})))
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
