"""`illume schedule`: its options."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from illume_lightning.schedule.display import remaining, tail
from illume_lightning.schedule.runner import PROGRAM, Runner, StepError
from illume_lightning.schedule.scripts import shell_script
from illume_lightning.schedule.seeds import Seeds
from illume_lightning.schedule.steps import read_schedule

_TAIL_LINES = 20


def main(args: Sequence[str], program: Sequence[str] = PROGRAM) -> int:
    """Do, or show, what a schedule's file says.

    Args:
        args: Words of the command line after `illume schedule`.
        program: What a step's command is given to.

    Returns:
        The exit status: 0, 1 if a step failed, 128 + a signal that stopped it.

    Raises:
        OSError: If a file is missing, or another process does this schedule.
        ValueError: If something in the file is wrong, or a step's output was made from something else.
    """
    end = list(args).index("--") if "--" in args else len(args)
    options = _parser().parse_args(args[:end])
    seeds = options.seeds or [options.seed]
    twice = [seed for number, seed in enumerate(seeds) if seed in seeds[:number]]
    if twice:
        raise ValueError(f"--seeds names {twice[0]} twice: give each seed once")
    schedules = [read_schedule(options.file, seed, args[end + 1 :]) for seed in seeds]
    part = schedules[0].part(options.first, options.last)
    launcher = shlex.split(options.launcher)
    work = Seeds(schedules, launcher, program) if options.seeds else Runner(schedules[0], launcher, program)
    if options.script:
        sys.stdout.write(shell_script(schedules, part, options.script, launcher, options.file))
        return 0
    if options.dry_run:
        outlook = work.outlook(part)
        sys.stdout.write(outlook.text + remaining(outlook.minutes, outlook.unknown))
        return 0
    try:
        status = work.run(part, options.changed)
    except StepError as error:
        sys.stderr.write(_failure(error))
        return 1
    sys.stdout.write(work.summary())
    sys.stdout.flush()
    if status:
        sys.stderr.write(f"stopped by signal {status - 128}; the same command continues\n")
    return work.write_table(part) if isinstance(work, Seeds) and not status else status


def _failure(error: StepError) -> str:
    """The end of the log, where it is, and what to do."""
    lines = "\n".join(tail(error.log, _TAIL_LINES))
    return f"{lines}\n\nillume schedule: {error}; all it wrote is in {Path(error.log)}. The same command continues.\n"


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no seed: give a whole number of at least 0")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="illume schedule",
        usage="%(prog)s FILE [OPTIONS] [-- FLAGS OF EVERY FIT]",
        description="Do all steps of a schedule, each once. It can be stopped or killed at any time: the same "
        "command continues. Logs and state are in runs/WORLD/schedule/seedN.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "file",
        metavar="FILE",
        help="YAML file with world and steps, such as experiments/shapes/schedule.yaml",
    )
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument(
        "--seed", type=_seed, default=0, metavar="N", help="of all fits; also names the folders of their runs"
    )
    seeds.add_argument(
        "--seeds",
        type=_seed,
        nargs="+",
        metavar="N",
        help="all steps with each of these seeds, then a table of mean and deviation of their scores in "
        "runs/WORLD/schedule/table-N-N; after FILE",
    )
    add("--from", dest="first", metavar="STEP", help="begin here; what comes before must be finished")
    add("--until", dest="last", metavar="STEP", help="end after this one")
    add("--dry-run", action="store_true", help="show what is to be done, and how long it will take")
    changed = parser.add_mutually_exclusive_group()
    changed.add_argument(
        "--redo",
        dest="changed",
        action="store_const",
        const="redo",
        default="refuse",
        help="outputs of steps that have changed, or of what they were made from, are moved aside and made again",
    )
    changed.add_argument(
        "--keep",
        dest="changed",
        action="store_const",
        const="keep",
        default="refuse",
        help="steps that have changed go on in the outputs that are there",
    )
    add(
        "--print",
        dest="script",
        choices=("plain", "torchrun", "slurm"),
        help="write a shell script of the commands to standard output instead",
    )
    add(
        "--launcher",
        default="",
        metavar="WORDS",
        help="starts every fit, such as 'torchrun --nproc_per_node 8'",
    )
    return parser
