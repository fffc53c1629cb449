"""A schedule as a shell script, for clusters where no one process may stay."""

import shlex
from collections.abc import Sequence
from typing import Literal

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
    schedule: Schedule, part: range, kind: Kind, launcher: Sequence[str] = (), source: str = ""
) -> str:
    """The commands of a part of the steps.

    Reports are left out: they are about what `illume schedule` itself has recorded.

    Args:
        schedule: The steps.
        part: Which of them.
        kind: As they are; fits by torchrun; or each a job of Slurm.
        launcher: Starts a fit's module in place of `illume`, or of torchrun.
        source: The schedule's file, for the heading.
    """
    head = {"plain": "", "torchrun": _TORCHRUN_HEAD, "slurm": _SLURM_HEAD}[kind]
    lines = [
        "#!/bin/bash",
        f"# illume schedule {source} --seed {schedule.seed} --print {kind}",
        "set -euo pipefail",
        *head.splitlines(),
    ]
    write = {"plain": _plain, "torchrun": _torchrun, "slurm": _slurm}[kind]
    previous = ""
    for number in part:
        step = schedule.steps[number]
        lines.append(f"\n# {number + 1}/{len(schedule.steps)} {step.name}")
        if step.command[0] == "report":
            lines.append(
                f"# left out, it needs the record of illume schedule: illume {shlex.join(step.command)}"
            )
            continue
        lines.append(write(step, launcher, previous))
        previous = step.name
    return "\n".join(lines) + "\n"


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
