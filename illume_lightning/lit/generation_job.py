"""A job of many lines, for one process or several: an answer follows from its line, the settings and the model alone.

It does not depend on its neighbours, on the number of processes, or on how often the job was interrupted.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

import torch

from illume_lightning.data.writer import end_with_parent
from illume_lightning.host_memory import keep_freed_memory
from illume_lightning.lit.answers import RECORDS, AnswerFolder
from illume_lightning.lit.device import choose_device
from illume_lightning.lit.illume import Illume
from illume_lightning.lit.job_lines import Line
from illume_lightning.lit.worker import Drawing, Settings, Worker

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """Where a model lies and how it runs; arguments as ``Illume.load``. Every process loads its own."""

    run: str
    tokenizer: str | None = None
    diffusion_decoder: str | None = None
    device: str = "auto"
    dtype: str = "float32"
    slots: int = 16
    context: int = 4096
    drawing: Drawing = field(default_factory=Drawing)

    def load(self, process: int = 0) -> Illume:
        """The model; of several accelerators, each process takes the next."""
        device = choose_device(self.device)
        if device.type != "cpu" and device.index is None:
            device = torch.device(device.type, process % torch.accelerator.device_count())
        if device.type == "cpu":
            keep_freed_memory()
        else:
            torch.accelerator.set_device_index(device)
        return Illume.load(
            self.run,
            self.tokenizer,
            self.diffusion_decoder,
            str(device),
            getattr(torch, self.dtype),
            slots=self.slots,
            context=self.context,
            defaults=self.drawing.defaults(),
        )


def run_job(
    lines: Sequence[Line],
    images: Path,
    output: str | Path,
    model: Model,
    settings: Settings,
    processes: int = 1,
    shard: tuple[int, int] = (1, 1),
) -> int:
    """Answer a job's lines into a folder; called again, it does what is missing.

    Args:
        lines: of the job, all of them.
        images: folder that names of images are relative to.
        output: the folder.
        model: to answer with.
        settings: of the job.
        processes: that work side by side.
        shard: i and n: of the lines, those of the i-th of n commands, from 1.

    Returns:
        Number of this command's lines that can't be worked on.

    Raises:
        ValueError: if an option is out of range, or the folder holds other answers.
        FileNotFoundError: if a part of the model is missing.
    """
    number, count = shard
    if not 1 <= number <= count or processes < 1:
        raise ValueError(
            f"shard {number}/{count} and {processes} processes: choose 1/n to n/n, and 1 or more"
        )
    folder = AnswerFolder(output)
    own = lines[number - 1 :: count]
    shares = [
        _Share(folder, f"{number}-of-{count}.{process}", process, processes, own[process::processes], images)
        for process in range(min(processes, len(own)))
    ]
    if processes == 1:
        for share in shares:
            share.work(model, settings)
    else:
        _spread(shares, model, settings)
    return report(folder, folder.finish(lines), shard)


def report(
    folder: AnswerFolder, records: Sequence[dict[str, Any] | None], shard: tuple[int, int] = (1, 1)
) -> int:
    """Tell what is there; returns the number of this command's lines that failed."""
    there = [record for record in records if record is not None]
    num_answers = sum("error" not in record for record in there)
    num_pictures = sum(len(record.get("pictures", ())) for record in there)
    failures = [record for record in records[shard[0] - 1 :: shard[1]] if record and "error" in record]
    log.info("%s: %d of %d answers, %d pictures", folder.path, num_answers, len(records), num_pictures)
    if failures:
        log.warning("%d lines failed; %s says why", len(failures), folder.path / RECORDS)
    return len(failures)


@dataclass(frozen=True)
class _Share:
    """Lines of one process."""

    folder: AnswerFolder
    name: str
    process: int
    processes: int
    lines: Sequence[Line]
    images: Path

    def work(self, model: Model, settings: Settings) -> None:
        if self.processes > 1:
            torch.set_num_threads(max(1, torch.get_num_threads() // self.processes))
        worker = Worker(model.load(self.process), settings, self.images)
        todo = worker.unfinished(self.lines, self.folder.finished())
        self.folder.write(worker.work(todo), self.name, self.lines, self.process)


def _spread(shares: Sequence[_Share], model: Model, settings: Settings) -> None:
    """A process for each share; the first error ends all."""
    # Spawned, not forked: a fork copies the locks of threads that it does not copy.
    context = get_context("spawn")
    running: dict[Any, Any] = {}
    try:
        for share in shares:
            receiver, sender = context.Pipe(duplex=False)
            running[receiver] = context.Process(
                target=_tell, args=(share, model, settings, sender), daemon=True
            )
            running[receiver].start()
            sender.close()
        while running:
            for ready in connection.wait(list(running)):
                _join(running.pop(ready), ready)
    finally:
        for process in running.values():
            process.terminate()


def _tell(share: _Share, model: Model, settings: Settings, sender: connection.Connection) -> None:
    """Work on a share, and tell how it ended."""
    end_with_parent()
    try:
        share.work(model, settings)
    except (ValueError, OSError, ImportError) as error:
        sender.send(error)
    else:
        sender.send(None)


def _join(process: Any, receiver: Any) -> None:
    """Wait for a process, and raise the error that it ended with, if any."""
    try:
        error = receiver.recv()
    except EOFError:
        process.join()
        reason = (
            "failed, see above"
            if process.exitcode > 0
            else "was killed, maybe for memory: try fewer --processes"
        )
        raise ChildProcessError(
            f"process {process.name} {reason}; what is finished is kept, and the same command goes on"
        ) from None
    process.join()
    if error is not None:
        raise error
