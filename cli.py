"""The ``illume`` command.

``fit``, ``validate``, ``test`` and ``predict`` are LightningCLI's; ``prepare``, ``generate``, ``export``,
``app``, ``parity`` and ``doctor`` are ours. Heavy libraries are imported only by the subcommand that needs them.
"""

import json
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningCLI

RUN_COMMANDS = ("fit", "validate", "test", "predict")

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

Training (LightningCLI; one YAML is one run)
  fit -c FILE.yaml               train; started again, it continues where it stopped
  validate -c FILE.yaml          held-out metrics and picture grids of the run's last checkpoint
  test -c FILE.yaml              the same on the test data
  predict -c FILE.yaml           reconstruct a store of pictures; an MLLM answers a file of lines instead

Use
  generate RUN OUT PROMPT...     pictures of prompts, by a trained MLLM
  generate RUN OUT --jobs FILE.jsonl
                                 pictures, edits and answers to the lines of a file; - reads standard input
  export RUN OUT [--dtype bfloat16]
                                 a run's model in the published layout: MLLM, DualViTok or diffusion decoder
  app RUN [--examples STORE]     a web page to chat, generate, edit and reconstruct with a trained MLLM

Checks
  parity DIR [--device DEVICE]   compare with recorded tensors of the official model
  doctor                         versions, devices, caches, and what is missing

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
    try:
        _dispatch(command, rest)
    except _user_errors(command) as error:
        if wants_traceback:
            raise
        sys.stderr.write(f"illume {command}: error: {_one_line(error)}\n")
        raise SystemExit(2) from None


def _dispatch(command: str, rest: list[str]) -> None:
    if command in RUN_COMMANDS:
        if rest == [] or rest[0] in ("-h", "--help"):
            sys.stdout.write(RUN_USAGE.format(command=command, what=WHAT[command]))
        else:
            run([command, *("--help" if argument == "--help-all" else argument for argument in rest)])
    elif command == "prepare":
        _prepare(rest)
    elif command == "generate":
        from jsonargparse import auto_cli

        auto_cli(generate, args=_with_prompts(rest), prog="illume generate", as_positional=True)
    elif command == "export":
        from jsonargparse import auto_cli

        auto_cli(export, args=rest, prog="illume export", as_positional=True)
    elif command == "app":
        from jsonargparse import auto_cli

        auto_cli(app, args=rest or ["--help"], prog="illume app", as_positional=True)
    elif command == "parity":
        from jsonargparse import auto_cli

        auto_cli(parity, args=rest, prog="illume parity", as_positional=True)
    elif command == "doctor":
        from jsonargparse import auto_cli

        auto_cli(doctor, args=rest, prog="illume doctor")
    else:
        known = ", ".join((*RUN_COMMANDS, "prepare", "generate", "export", "app", "parity", "doctor"))
        raise ValueError(f"unknown command {command!r}: use one of {known}.")


def run(args: list[str]) -> "LightningCLI":
    """Run ``fit``, ``validate``, ``test`` or ``predict`` in this process; returns the finished CLI."""
    from callbacks import ResolutionCurriculum
    from illume_lightning.lit.cli import IllumeCLI

    return IllumeCLI.run(args, ResolutionCurriculum)


def generate(
    run: str,
    out: str,
    prompts: list[str] | None = None,
    jobs: str | None = None,
    tokenizer: str | None = None,
    diffusion_decoder: str | None = None,
    decoder: Literal["dualvitok", "diffusion"] = "dualvitok",
    size: str | None = None,
    seed: int = 0,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance: float | None = None,
    text_temperature: float | None = None,
    text_top_k: int | None = None,
    text_top_p: float | None = None,
    max_tokens: int = 512,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    slots: int = 16,
    context: int = 4096,
    processes: int = 1,
    shard: str = "1/1",
) -> None:
    """Make pictures and answer questions with a trained MLLM: `illume generate RUN OUT [PROMPT...] [OPTIONS]`.

    Lines of a job are JSON, with an "id" and a "seed" if wanted: {"prompt": ..., "size": [height, width]},
    {"image": file, "instruction": ...}, {"image": file or files, "question": ...} or {"messages": [...]}. The command
    can be killed and given again: it continues. Lines that can't be worked on are told, and exit status is 1.

    Args:
        run: folder of an MLLM run, or one of its checkpoints.
        out: folder for pictures, answers.jsonl and index.html.
        prompts: a picture of each; written after OUT, before all options.
        jobs: file of JSON lines instead, - for standard input; its images' names are relative to its folder.
        tokenizer: DualViTok run, checkpoint or published file; by default the one that the run names.
        diffusion_decoder: run, checkpoint or published folder.
        decoder: what makes the pictures; diffusion makes them twice as large.
        size: of pictures whose line has none, HEIGHTxWIDTH in pixels; by default the model's square.
        seed: gives lines without a seed theirs, by their id.
        temperature: of codes; by default the model's, as for all of sampling. 0 takes the most likely.
        top_k: of semantic codes; three times as many of pixel codes.
        top_p: of codes.
        guidance: scale of classifier-free guidance; 1 is none.
        text_temperature: of words.
        text_top_k: of words.
        text_top_p: of words.
        max_tokens: most tokens of an answer in words.
        device: torch device; auto takes the accelerators there are, one for each process.
        dtype: of the language model.
        slots: sequences that run side by side in a process; a guided picture takes two.
        context: most tokens of a conversation with its answer.
        processes: each with a model of its own.
        shard: i/n does the i-th of n shares of the lines; give all n commands the same OUT.
    """
    from illume_lightning.lit.generation_job import Model, run_job
    from illume_lightning.lit.job_lines import prompt_lines, read_jobs
    from illume_lightning.lit.worker import Drawing, Settings

    if bool(prompts) == bool(jobs):
        raise ValueError("give prompts after OUT, or --jobs: one of the two")
    sides = None if size is None else _numbers(size, "x", "size", "HEIGHTxWIDTH, such as 256x384")
    share = _numbers(shard, "/", "shard", "i/n, such as 1/4")
    drawing = Drawing(temperature, top_k, top_p, guidance, text_temperature, text_top_k, text_top_p)
    model = Model(run, tokenizer, diffusion_decoder, device, dtype, slots, context, drawing)
    settings = Settings(seed, sides, decoder, max_tokens)
    lines, images = read_jobs(jobs) if jobs else (prompt_lines(prompts or []), Path.cwd())
    if run_job(lines, images, out, model, settings, processes, share):
        raise SystemExit(1)


def _numbers(text: str, sign: str, name: str, wanted: str) -> tuple[int, int]:
    found = re.fullmatch(rf"(\d+){sign}(\d+)", text)
    if found is None:
        raise ValueError(f"{name} is {text!r}: give {wanted}")
    return int(found[1]), int(found[2])


def export(
    run: str,
    out: str,
    format: Literal["published"] = "published",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
) -> None:
    """Write a run's model in the layout of the official release; docs/formats.md says what that holds.

    Args:
        run: folder of an MLLM, DualViTok or diffusion decoder run, or one of its checkpoints.
        out: folder to make.
        format: of the folder; published is the one there is.
        dtype: of the weights; by default as trained.
    """
    from illume_lightning.lit.export import export_run

    export_run(run, out, dtype)
    sys.stdout.write(f"{out}: {format} layout\n")


def app(
    run: str,
    tokenizer: str | None = None,
    diffusion_decoder: str | None = None,
    examples: str | None = None,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    host: str = "127.0.0.1",
    port: int = 7860,
    slots: int = 16,
    context: int = 4096,
    max_upload_mb: int = 16,
    queue: int = 16,
) -> None:
    """Show a web page to chat, generate, edit and reconstruct with a trained MLLM, until it is stopped.

    Args:
        run: folder of an MLLM run, or one of its checkpoints.
        tokenizer: DualViTok run, checkpoint or published file; by default the one that the run names. Without one
            there are only words.
        diffusion_decoder: run, checkpoint or published folder; then each picture can be had at twice the size.
        examples: to click on: a store of conversations, or a folder whose subfolders have one named val each, such
            as data/shapes.
        device: torch device; auto takes the first accelerator there is.
        dtype: of the language model.
        host: address to listen on. The default is for this machine alone; 0.0.0.0 lets everyone in that reaches it,
            without a password.
        port: to listen on.
        slots: sequences that run side by side; a guided picture takes two.
        context: most tokens of a conversation with its answer.
        max_upload_mb: largest file of a picture, in MiB.
        queue: most users that wait for the model; more are refused.
    """
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError("the web page needs Gradio: pip install 'illume-lightning[app]'") from error
    import torch

    from illume_lightning.app.examples import Examples, read_examples
    from illume_lightning.app.page import Server, build_page
    from illume_lightning.app.studio import Studio
    from illume_lightning.lit.illume import Illume

    shown = read_examples(examples) if examples else Examples()
    parts = (run, tokenizer, diffusion_decoder, device, getattr(torch, dtype))
    illume = Illume.load(*parts, slots=slots, context=context)
    Server(host, port, max_upload_mb, queue).show(build_page(Studio(illume), shown))


def parity(directory: str, device: str = "cpu") -> None:
    """Compare this installation with recorded tensors of the official model; exit status 1 on a miss.

    Args:
        directory: folder with the fixtures.
        device: torch device to compute on, in fp32: cpu, cuda:0, npu:0.
    """
    from illume_lightning.nn.parity import run, table

    checks = run(directory, device)
    sys.stdout.write(table(checks) + "\n")
    if not all(check.passed for check in checks):
        raise SystemExit(1)


def doctor() -> None:
    """Print versions, devices, caches, and what is missing with the way to get it."""
    from illume_lightning.doctor import report

    sys.stdout.write(report())


def _prepare(rest: list[str]) -> None:
    from jsonargparse import auto_cli

    from illume_lightning.data.prepare import prepare_images
    from illume_lightning.data.prepare_conversations import prepare_conversations
    from illume_lightning.data.worlds.emoji import prepare_emoji
    from illume_lightning.data.worlds.emoji_conversations import (
        prepare_emoji_conversations,
        prepare_emoji_tokenizer,
    )
    from illume_lightning.data.worlds.photographs import prepare_photographs
    from illume_lightning.data.worlds.shapes import prepare_shapes
    from illume_lightning.data.worlds.shapes_conversations import (
        prepare_shapes_conversations,
        prepare_shapes_tokenizer,
    )
    from illume_lightning.lit.prepare_latents import prepare_latents
    from illume_lightning.lit.prepare_tokens import prepare_tokens

    importers: dict[str, Any] = {
        "images": prepare_images,
        "conversations": prepare_conversations,
        "shapes": prepare_shapes,
        "photographs": prepare_photographs,
        "emoji": prepare_emoji,
        "shapes-conversations": prepare_shapes_conversations,
        "shapes-tokenizer": prepare_shapes_tokenizer,
        "emoji-conversations": prepare_emoji_conversations,
        "emoji-tokenizer": prepare_emoji_tokenizer,
        "latents": prepare_latents,
        "tokens": prepare_tokens,
    }
    auto_cli(importers, args=_with_list(rest) or ["--help"], prog="illume prepare", as_positional=True)


def _with_prompts(rest: list[str]) -> list[str]:
    """`RUN OUT PROMPT...` with the prompts as an option, as jsonargparse wants a list."""
    count = next((number for number, text in enumerate(rest) if text.startswith("-")), len(rest))
    if count < 3:
        return rest or ["--help"]
    return [*rest[:2], "--prompts", json.dumps(rest[2:count]), *rest[count:]]


def _with_list(rest: list[str]) -> list[str]:
    """`SOURCE... OUT` with the sources in one argument, as jsonargparse wants a list."""
    count = next((number for number, text in enumerate(rest) if text.startswith("-")), len(rest))
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
    if command in RUN_COMMANDS and "lightning" in sys.modules:
        from lightning.fabric.utilities.exceptions import MisconfigurationException

        errors += (MisconfigurationException,)
    return errors


_HEADING = re.compile(
    r"(- )?(Parser key|Does not validate|Subtypes:|Errors:|Given value|Problem with given class_path"
    r"|Expected a <class 'NoneType'>)"
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
    message = re.sub(r"<class '([\w.]+)'>", r"\1", message)
    message = re.sub(r"a typing\.Literal\[([^\]]*)\]", r"one of \1", message)
    return f"{'.'.join(keys)}: {message}" if keys else message


if __name__ == "__main__":
    main()
