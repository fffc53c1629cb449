"""A schedule as a shell script, for clusters where no one process may stay."""

import shlex
from collections.abc import Sequence
from typing import Literal

from illume_lightning.schedule.seeds import report_command, shared_steps
from illume_lightning.schedule.steps import Schedule, Step

Kind = Literal["plain", "torchrun", "slurm"]

_TORCHRUN_HEAD = """\
# On several nodes run this on each, with its NODE_RANK; the nodes share a file system.
NODES=${NODES:-1} GPUS=${GPUS:-8} NODE_RANK=${NODE_RANK:-0} HEAD=${HEAD:-localhost} PORT=${PORT:-29500}
# Node 0 alone prepares and evaluates; the others wait for it at the next fit, so many seconds.
WAIT=${WAIT:-604800}
TORCHRUN=(torchrun --nproc_per_node "$GPUS" --nnodes "$NODES" --node_rank "$NODE_RANK"
  --master_addr "$HEAD" --master_port "$PORT" --rdzv_conf "timeout=$WAIT")
"""
_SLURM_HEAD = """\
# Run it once on the login node; jobs start when the one before has ended well. A job that was requeued continues;
# after one that ran out of time run this again: what is finished ends at once.
export NODES=${NODES:-1} GPUS=${GPUS:-8}
CPUS=${CPUS:-8} TIME=${TIME:-7-00:00:00} OPTIONS=${OPTIONS:-}
FIT=(--nodes "$NODES" --ntasks-per-node "$GPUS" --gres "gpu:$GPUS" --cpus-per-task "$CPUS" --time "$TIME" --requeue)
OTHER=(--nodes 1 --ntasks 1 --gres gpu:1 --cpus-per-task "$CPUS" --time "$TIME" --requeue)
submit() {  # NAME WORDS... -> id of the job
  sbatch --parsable --kill-on-invalid-dep=yes --job-name "$1" --output "%x-%j.log" $OPTIONS "${@:2}"
}
"""
_DEVICES = '--trainer.devices "$GPUS" --trainer.num_nodes "$NODES"'


def shell_script(
    schedules: Sequence[Schedule], part: range, kind: Kind, launcher: Sequence[str] = (), source: str = ""
) -> str:
    """The commands of a part of the steps, with every seed; those that name no seed only once.

    Reports of one seed are left out: they are about what `illume schedule` itself has recorded.

    Args:
        schedules: The steps, one for each seed.
        part: Which of them.
        kind: As they are; fits by torchrun; or each a job of Slurm.
        launcher: Starts a fit's module in place of `illume`, or of torchrun.
        source: The schedule's file, for the heading.
    """
    option = " ".join(["--seeds" if len(schedules) > 1 else "--seed", *(str(s.seed) for s in schedules)])
    head = {"plain": "", "torchrun": _TORCHRUN_HEAD, "slurm": _SLURM_HEAD}[kind]
    lines = [
        "#!/bin/bash",
        f"# illume schedule {source} {option} --print {kind}",
        "set -euo pipefail",
        *head.splitlines(),
    ]
    for number in range(len(schedules)):
        lines += _seed(schedules, number, part, kind, launcher)
    words = report_command(schedules, part)
    if len(schedules) > 1 and words:
        lines += ["\n# table over the seeds", _table(shlex.join(("illume", *words)), kind)]
    return "\n".join(lines) + "\n"


def _seed(
    schedules: Sequence[Schedule], number: int, part: range, kind: Kind, launcher: Sequence[str]
) -> list[str]:
    """The commands of one seed that those before it don't have."""
    schedule, before = schedules[number], shared_steps(schedules, number)
    steps = schedule.steps[part.start : part.stop]
    # What later seeds have too: with Slurm their jobs wait for the last such step, not for all of the first seed.
    later = {step for other in schedules[1:] for step in other.steps} if number == 0 else set()
    several = kind == "slurm" and len(schedules) > 1
    previous = "shared" if several and before.intersection(steps) else ""
    lines = ["\nprevious=$shared"] if previous else []
    write = {"plain": _plain, "torchrun": _torchrun, "slurm": _slurm}[kind]
    for place, step in enumerate(steps, part.start + 1):
        if step in before:
            continue
        seed = f"seed {schedule.seed}, " if len(schedules) > 1 else ""
        lines.append(f"\n# {seed}{place}/{len(schedule.steps)} {step.name}")
        if step.command[0] == "report":
            lines.append(
                f"# left out, it needs the record of illume schedule: illume {shlex.join(step.command)}"
            )
            continue
        lines.append(write(step, launcher, previous))
        previous = step.name
        if several and step in later:
            lines.append("shared=$previous")
    return [*lines, "ends=${ends:+$ends:}$previous"] if several and previous else lines


def _table(command: str, kind: Kind) -> str:
    if kind == "torchrun":
        return f'[ "$NODE_RANK" != 0 ] || {command}'
    if kind == "slurm":
        wrapped = shlex.quote(f"srun {command}")
        return f'submit table --dependency="afterok:$ends" "${{OTHER[@]}}" --wrap {wrapped}'
    return command


def _plain(step: Step, launcher: Sequence[str], previous: str) -> str:
    return _program(step, launcher)


def _torchrun(step: Step, launcher: Sequence[str], previous: str) -> str:
    if not step.is_fit:
        return f'[ "$NODE_RANK" != 0 ] || {_program(step, launcher)}'
    program = shlex.join(launcher) if launcher else '"${TORCHRUN[@]}"'
    return f"{program} -m cli {shlex.join(step.command)} {_DEVICES}"


def _slurm(step: Step, launcher: Sequence[str], previous: str) -> str:
    dependency = "--dependency=afterok:$previous " if previous else ""
    resources = '"${FIT[@]}"' if step.is_fit else '"${OTHER[@]}"'
    command = f"srun {_program(step, launcher)}" + (f" {_DEVICES}" if step.is_fit else "")
    return f"previous=$(submit {step.name} {dependency}{resources} --wrap {shlex.quote(command)})"


def _program(step: Step, launcher: Sequence[str]) -> str:
    program = f"{shlex.join(launcher)} -m cli" if launcher and step.is_fit else "illume"
    return f"{program} {shlex.join(step.command)}"
