"""The ``illume`` command.

``fit``, ``validate``, ``test`` and ``predict`` are LightningCLI's; the others are ours. Heavy libraries are imported
only by the subcommand that needs them.
"""

import json
import logging
import os
import re
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from contextlib import nullcontext
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from illume_lightning import commands
from illume_lightning.releases import refuse_compromised

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningCLI

RUN_COMMANDS = ("fit", "validate", "test", "predict")
IMPORTERS = {
    "images": "illume_lightning.data.prepare:prepare_images",
    "conversations": "illume_lightning.data.prepare_conversations:prepare_conversations",
    "shapes": "illume_lightning.data.worlds.prepare_shapes:prepare_shapes",
    "photographs": "illume_lightning.data.worlds.photographs:prepare_photographs",
    "emoji": "illume_lightning.data.worlds.emoji:prepare_emoji",
    "shapes-conversations": "illume_lightning.data.worlds.shapes_conversations:prepare_shapes_conversations",
    "shapes-tasks": "illume_lightning.data.worlds.shapes_tasks:prepare_shapes_tasks",
    "shapes-tokenizer": "illume_lightning.data.worlds.shapes_conversations:prepare_shapes_tokenizer",
    "emoji-conversations": "illume_lightning.data.worlds.emoji_conversations:prepare_emoji_conversations",
    "emoji-tokenizer": "illume_lightning.data.worlds.emoji_conversations:prepare_emoji_tokenizer",
    "latents": "illume_lightning.lit.prepare_latents:prepare_latents",
    "tokens": "illume_lightning.lit.prepare_tokens:prepare_tokens",
    "merge": "illume_lightning.data.writer:merge_shards",
    "check": "illume_lightning.data.check:check_stores",
}
"""What `illume prepare` calls."""
OWN_COMMANDS = (
    *("prepare", "plan", "schedule", "generate", "export", "app", "evaluate", "report"),
    *("reproduce", "consolidate", "parity", "doctor"),
)

USAGE = """\
usage: illume COMMAND [OPTIONS]

Data
  prepare images SOURCE... OUT   folders, webdataset tars or parquet files -> a store for training
  prepare conversations SOURCE... OUT --tokenizer DIR
                                 LLaVA, ShareGPT, edits or captioned images -> a store for the MLLM
  prepare shapes|photographs|emoji OUT
                                 the embedded worlds
  prepare shapes-conversations|shapes-tokenizer OUT
                                 every task of the MLLM about shapes, and a text tokenizer for them
  prepare emoji-conversations|emoji-tokenizer OUT PACKAGES
                                 the same about emoji
  prepare latents|tokens STORE OUT TOKENIZER
                                 what a trained DualViTok makes of a store, for the diffusion decoder or the MLLM
  prepare ... --shard I/N        any of these by N jobs, I from 0, on any machines with one shared folder
  prepare merge OUT              then joins what they wrote: the same store as of one job
  prepare check STORE            reads every byte of a store and compares it with what was written

Training (LightningCLI; one YAML is one run)
  fit -c FILE.yaml               train; started again, it continues where it stopped
  validate -c FILE.yaml          held-out metrics and picture grids of the run's last checkpoint
  test -c FILE.yaml              the same on the test data
  predict -c FILE.yaml           reconstruct a store of pictures; an MLLM answers a file of lines instead
  plan FILE.yaml... --devices N --device h100|a100|910b|...
                                 memory, days and cost of a run, before anything is rented
  schedule FILE.yaml [--dry-run] every step from data to scores in one command; started again, it continues
  schedule FILE.yaml --seeds N... all of it with each seed, then a table of mean and deviation of the scores

Use
  generate RUN OUT PROMPT...     pictures of prompts, by a trained MLLM
  generate RUN OUT --jobs FILE.jsonl
                                 pictures, edits and answers to the lines of a file; - reads standard input
  export RUN OUT [--dtype bfloat16]
                                 a run's model in the published layout: MLLM, DualViTok or diffusion decoder
  app RUN [--examples STORE]     a web page to chat, generate, edit and reconstruct with a trained MLLM
  evaluate RUN [--tokenizer DIR] [--limit N]
                                 scores of an MLLM, a DualViTok or a diffusion decoder on held-out data
  report FOLDER [--out FOLDER]   a schedule's scores, samples, curves and records on one page
  report RUN... [--out FOLDER]   scores of several runs side by side, mean and deviation over their seeds

Checks
  reproduce RUN [-- FLAGS]       do a recorded run again, and say whether metrics and weights come out equal
  consolidate FOLDER FILE        one checkpoint file of a sharded one
  parity DIR [--device DEVICE]   compare with recorded tensors of the official model
  doctor                         versions, devices, caches, and what is missing
  doctor RUN                     reads a run's checkpoints in full: which are whole, and which `fit` goes on from

`illume COMMAND --help` tells more. `--traceback` anywhere shows where an error came from.
"""

RUN_USAGE = """\
usage: illume {command} -c FILE.yaml [-c OVERLAY.yaml ...] [--KEY VALUE ...]

  -c FILE.yaml             the run; later files and flags override earlier ones
  --trainer.KEY VALUE      any argument of lightning's Trainer:
                           --trainer.accelerator cpu|cuda|npu, --trainer.devices 8, --trainer.num_nodes 4,
                           --trainer.strategy ddp, --trainer.precision bf16-mixed, --trainer.max_steps 1000
  --model.KEY VALUE        any argument of the run's LightningModule
  --data.KEY VALUE         any argument of the run's datamodule, e.g. --data.num_workers 8
  --seed_everything N      seed of weights, data order and noise; also names the run's folder
  --ckpt_path FILE         a checkpoint instead of the run's last one
  --print_config           print the whole resolved configuration and stop
  --help-all               every option of every class (slow: it imports everything)

{command}: {what}
Examples:
  illume {command} -c experiments/shapes/dualvitok.yaml
  illume {command} -c experiments/paper/dualvitok.yaml -c experiments/hardware/cuda.yaml
"""

WHAT = {
    "fit": "train; a run that was interrupted or killed continues from its last checkpoint.",
    "validate": "log val/<size>/<metric> and write picture grids, from the run's last checkpoint.",
    "test": "the same on the datamodule's test data.",
    "predict": "reconstruct the datamodule's predict data, from the run's last checkpoint; an MLLM answers the lines "
    "of --data.predict FILE.jsonl, as `illume generate` does.",
}


def main(args: Sequence[str] | None = None) -> None:
    """Run one subcommand; errors that a user can mend end in one line and exit status 2."""
    arguments = list(sys.argv[1:] if args is None else args)
    wants_traceback = "--traceback" in arguments
    arguments = [argument for argument in arguments if argument != "--traceback"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(USAGE)
        return
    command, rest = arguments[0], arguments[1:]
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for package in ("illume_lightning", "callbacks"):
        logging.getLogger(package).setLevel(logging.INFO)
    # Nothing that was not asked for goes over the network.
    for name, value in (("HF_HUB_DISABLE_TELEMETRY", "1"), ("GRADIO_ANALYTICS_ENABLED", "False")):
        os.environ.setdefault(name, value)
    # An NPU's backend is loaded where it is used, and says there what it misses; torch would end in a traceback.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    try:
        _dispatch(command, rest)
    except _user_errors(command) as error:
        if wants_traceback:
            raise
        sys.stderr.write(f"illume {command}: error: {_one_line(error)}\n")
        raise SystemExit(2) from None


def _dispatch(command: str, rest: list[str]) -> None:
    if command != "doctor":  # which says so among all the rest
        refuse_compromised()
    if command in RUN_COMMANDS:
        if rest == [] or rest[0] in ("-h", "--help"):
            sys.stdout.write(RUN_USAGE.format(command=command, what=WHAT[command]))
        else:
            run([command, *("--help" if argument == "--help-all" else argument for argument in rest)])
    elif command == "prepare":
        _prepare(rest)
    elif command == "schedule":
        commands.schedule(rest or ["--help"])
    elif command in OWN_COMMANDS:
        from jsonargparse import auto_cli

        given = _as_options(command, rest) if rest or command == "doctor" else ["--help"]
        # What `plan` requires are numbers that nobody could tell apart without their names; `report` takes a list.
        by_place = command not in ("plan", "report")
        auto_cli(getattr(commands, command), args=given, prog=f"illume {command}", as_positional=by_place)
    else:
        known = ", ".join((*RUN_COMMANDS, *OWN_COMMANDS))
        raise ValueError(f"unknown command {command!r}: use one of {known}.")


def run(args: list[str]) -> "LightningCLI":
    """Run ``fit``, ``validate``, ``test`` or ``predict`` in this process; returns the finished CLI."""
    from illume_lightning.lit import npu

    npu.check_installation()
    from callbacks import ResolutionCurriculum
    from illume_lightning.lit.cli import IllumeCLI

    return IllumeCLI.run(args, ResolutionCurriculum)


def _prepare(rest: list[str]) -> None:
    from jsonargparse import auto_cli

    from illume_lightning.data.shard import Shard, divided

    # Of all importers, but none of theirs.
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--shard")
    given, rest = parser.parse_known_args(rest)
    division = nullcontext() if given.shard is None else divided(Shard.parse(given.shard))
    # Only what is asked for: together they bring all libraries, which takes seconds.
    wanted = [rest[0]] if rest and rest[0] in IMPORTERS else list(IMPORTERS)
    importers = {name: resolve_name(IMPORTERS[name]) for name in wanted}
    with division:
        auto_cli(importers, args=_with_list(rest) or ["--help"], prog="illume prepare", as_positional=True)


def _as_options(command: str, rest: list[str]) -> list[str]:
    """What people write, as jsonargparse wants it."""
    if command == "generate":
        return _with_prompts(rest)
    if command == "plan":
        return _with_configs(rest)
    if command == "report":
        count = _num_places(rest)
        return ["--folders", json.dumps(rest[:count]), *rest[count:]] if count else rest
    if command == "reproduce" and "--" in rest:
        place = rest.index("--")
        return [*rest[:place], "--flags", json.dumps(rest[place + 1 :])]
    if command == "doctor" and _num_places(rest):  # which needs none
        return ["--run", *rest]
    if command == "evaluate":  # it wants a value of everything
        return ["--again=true" if argument == "--again" else argument for argument in rest]
    return rest


def _num_places(rest: list[str]) -> int:
    """How many arguments there are before the first option."""
    return next((number for number, text in enumerate(rest) if text.startswith("-")), len(rest))


def _with_prompts(rest: list[str]) -> list[str]:
    """`RUN OUT PROMPT...` with the prompts as an option, as jsonargparse wants a list."""
    count = _num_places(rest)
    if count < 3:
        return rest
    return [*rest[:2], "--prompts", json.dumps(rest[2:count]), *rest[count:]]


def _with_configs(rest: list[str]) -> list[str]:
    """`CONFIG...` and every `-c CONFIG` in one argument, as jsonargparse wants a list."""
    count = _num_places(rest)
    configs, options = rest[:count], rest[count:]
    while "-c" in options:
        place = options.index("-c")
        configs += options[place + 1 : place + 2]
        del options[place : place + 2]
    return ["--configs", json.dumps(configs), *options] if configs else options


def _with_list(rest: list[str]) -> list[str]:
    """`SOURCE... OUT` with the sources in one argument, as jsonargparse wants a list."""
    count = _num_places(rest)
    if rest[:1] not in (["images"], ["conversations"]) or count < 3 or rest[1].startswith("["):
        return rest
    return [rest[0], json.dumps(rest[1 : count - 1]), *rest[count - 1 :]]


def _user_errors(command: str) -> tuple[type[BaseException], ...]:
    from jsonargparse import ArgumentError

    errors: tuple[type[BaseException], ...] = (
        ValueError,
        OSError,
        ImportError,
        FloatingPointError,
        ArgumentError,
    )
    if command in (*RUN_COMMANDS, "reproduce") and "lightning" in sys.modules:
        from lightning.fabric.utilities.exceptions import MisconfigurationException

        errors += (MisconfigurationException,)
    return errors


_HEADING = re.compile(
    r"(- )?(Parser key|Does not validate|Subtypes:|Errors:|Given value|Problem with given class_path"
    r"|Expected a <class 'NoneType'>|Expected a path but)"
)


def _one_line(error: BaseException) -> str:
    """Where a configuration is wrong and what was expected, out of jsonargparse's tree of all types it tried."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) <= 1:
        return lines[0] if lines else type(error).__name__
    keys = [key for line in lines for key in re.findall(r'^Parser key "([^"]+)"', line)]
    causes = [line.removeprefix("- ") for line in lines if not _HEADING.match(line)]
    message = " or ".join(dict.fromkeys(causes)) or lines[0]
    given = next((line for line in lines if line.startswith("Given value:")), None)
    if given is not None and "Got value" not in message and "NestedArg" not in given:
        message += f". {given}"
    if "illume_lightning.lit.class_paths" in sys.modules:
        from illume_lightning.lit.class_paths import explained

        message = explained(message)
    message = re.sub(r"<class '([\w.]+)'>", r"\1", message)
    message = re.sub(r"a typing\.Literal\[([^\]]*)\]", r"one of \1", message)
    return f"{'.'.join(keys)}: {message}" if keys else message


if __name__ == "__main__":
    main()
