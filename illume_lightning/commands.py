"""What the commands of `illume` do, and their options; heavy libraries come in only when a command runs."""

import re
import sys
from pathlib import Path
from typing import Literal


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
    from illume_lightning.lit import npu

    npu.check_installation()
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
    from illume_lightning.lit import npu

    npu.check_installation()
    import torch

    from illume_lightning.app.examples import Examples, read_examples
    from illume_lightning.app.page import Server, build_page
    from illume_lightning.app.studio import Studio
    from illume_lightning.lit.illume import Illume

    shown = read_examples(examples) if examples else Examples()
    parts = (run, tokenizer, diffusion_decoder, device, getattr(torch, dtype))
    illume = Illume.load(*parts, slots=slots, context=context)
    Server(host, port, max_upload_mb, queue).show(build_page(Studio(illume), shown))


def evaluate(
    run: str,
    tokenizer: str | None = None,
    limit: int = 256,
    seed: int = 0,
    split: Literal["test", "val"] | None = None,
    out: str | None = None,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    slots: int = 32,
    temperature: float | None = None,
    guidance: float | None = None,
    again: bool = False,
) -> None:
    """Score a run on its held-out data: answers, pictures and edits, or reconstructions.

    Writes scores.json, scores.md, scores.tex and pictures of samples, and prints the table.

    Args:
        run: folder of an MLLM, DualViTok or diffusion decoder run, or one of its checkpoints.
        tokenizer: DualViTok run, checkpoint or published file; by default the one that the run names.
        limit: most conversations of a store, or most of its pictures at each size.
        seed: of the drawing of pictures.
        split: the run's stores to use; by default test where it names some, else val.
        out: folder to write to; by default scores in the run's folder.
        device: torch device; auto takes the first accelerator there is.
        dtype: of the language model.
        slots: sequences that run side by side; a guided picture takes two.
        temperature: of codes; by default the model's. 0 takes the most likely.
        guidance: scale of classifier-free guidance; 1 is none.
        again: evaluate even if the same evaluation of this checkpoint is there.
    """
    from illume_lightning.lit import npu

    npu.check_installation()
    from illume_lightning.evaluation.run import Options, evaluate_run
    from illume_lightning.evaluation.tables import markdown
    from illume_lightning.host_memory import keep_freed_memory
    from illume_lightning.lit.worker import Drawing

    keep_freed_memory()
    drawing = Drawing(temperature=temperature, guidance=guidance)
    options = Options(tokenizer, limit, seed, split, device, dtype, slots, drawing)
    sheet, is_new = evaluate_run(run, options, out, again)
    there = "" if is_new else f"evaluated already on {sheet.date}; --again does it anew\n\n"
    sys.stdout.write(there + markdown(sheet))


def report(folders: list[str], out: str | None = None) -> None:
    """Write a schedule's scores, samples and curves on one page; or compare evaluated runs over their seeds.

    Of one schedule: report.html, which needs nothing beside it, and report.md; runs and scores that are not there yet
    are named with the command that makes them. Of anything else a table of mean and standard deviation is printed.

    Args:
        folders: of a schedule, such as runs/shapes/schedule/seed0; or of evaluated runs, of scores, or of several
            schedules, such as runs/shapes/schedule/seed*: folders that differ in seed<N> are one run.
        out: folder to write to; by default a schedule's page goes to its own, and a comparison (seeds.md, seeds.tex,
            seeds.csv) nowhere.
    """
    from illume_lightning.report.seeds import find_scores

    if not folders:
        raise ValueError("no folder was given: name a schedule's, or those of evaluated runs")
    if len(folders) > 1 or find_scores(Path(folders[0])) is not None:
        from illume_lightning.report.seed_tables import write_seeds

        text, paths = write_seeds(folders, out)
        sys.stdout.write(text)
    else:
        try:
            import matplotlib  # noqa: F401
        except ModuleNotFoundError as error:
            raise ImportError("curves need matplotlib: pip install 'illume-lightning[report]'") from error
        from illume_lightning.report.page import write_report

        paths = write_report(folders[0], out)
    sys.stdout.writelines(f"{path}\n" for path in paths)


def schedule(args: list[str]) -> None:
    """Do all steps of a schedule's file, each once, wherever it was stopped or killed before.

    Args:
        args: as on the command line; they are read by the standard library, so that it starts at once.
    """
    from illume_lightning.schedule.command import main as run_schedule

    status = run_schedule(args)
    if status:
        raise SystemExit(status)


def plan(
    configs: list[str],
    devices: int,
    device: str,
    mfu: float = 0.4,
    strategy: Literal["ddp", "fsdp2"] = "ddp",
    price: float | None = None,
    json: str | None = None,
) -> None:
    """Say what a run will need, from its YAML alone: `illume plan CONFIG... --devices N --device h100 [OPTIONS]`.

    Prints parameters, memory of a device, products, steps' seconds, days and cost; docs/scaling.md says how they come
    about and what they leave out.

    Args:
        configs: YAML files of the run as for `illume fit`, without -c or with it; written before all options.
        devices: number of them.
        device: h100, h200, a100, l40s, rtx4090 or 910b.
        mfu: share of the device's speed that the run's products reach.
        strategy: ddp keeps all weights on each device, fsdp2 shares them out.
        price: of a device for an hour, in any currency.
        json: file to write all numbers to.
    """
    from callbacks import ResolutionCurriculum
    from illume_lightning.budget.estimate import check_hardware, estimate
    from illume_lightning.budget.table import markdown, write_json

    found = estimate(configs, check_hardware(device, devices, strategy, mfu, price), ResolutionCurriculum)
    sys.stdout.write(markdown(found))
    if json is not None:
        write_json(found, json)


def reproduce(
    run: str, out: str | None = None, tolerance: float = 1e-5, flags: list[str] | None = None
) -> None:
    """Do a recorded run again, and say whether it comes out equal: `illume reproduce RUN [OPTIONS] [-- FLAGS of fit]`.

    First the stores, checkpoints and tokenizers that it was made from are held against the record, then it is trained
    in another folder, from the present one, and its metrics and weights are compared. Killed and given again, it goes
    on. Exit status is 1 if anything differs by more than the tolerance.

    Args:
        run: folder of a run of `illume fit`, or one with its run.json and metrics.csv; it stays as it is.
        out: folder of the new run; by default the recorded one with -reproduced behind it.
        tolerance: largest relative difference of runs that are called equal.
        flags: of `illume fit`, written after --, such as --trainer.max_steps 20 to compare the first 20 steps alone.
    """
    from illume_lightning.lit import npu

    npu.check_installation()
    from callbacks import ResolutionCurriculum
    from illume_lightning.lit.cli import IllumeCLI
    from illume_lightning.reproduction.run import reproduce as do_again

    def fit(words: list[str]) -> None:
        # With several devices Lightning starts the others with the words that this process was started with.
        given, sys.argv = sys.argv, [sys.argv[0], *words]
        try:
            IllumeCLI.run(words, ResolutionCurriculum)
        finally:
            sys.argv = given

    def say(line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    verdict = do_again(run, fit, say, out, tolerance, flags or ())
    say(verdict.text)
    if not verdict.is_same:
        raise SystemExit(1)


def consolidate(folder: str, file: str) -> None:
    """Write one checkpoint file of a folder that FSDP2's devices wrote together.

    Needs the memory of the whole checkpoint.

    Args:
        folder: sharded checkpoint, such as RUN/checkpoints/last.ckpt of a run with strategy fsdp2_sharded.
        file: to write; the folder's own path puts it in the folder's place, which is kept as FOLDER.sharded.
    """
    from illume_lightning.nn.sharded_checkpoint import consolidate as write_one_file

    write_one_file(folder, file)


def parity(directory: str, device: str = "cpu") -> None:
    """Compare this installation with recorded tensors of the official model; exit status 1 on a miss.

    Args:
        directory: folder with the fixtures.
        device: torch device to compute on, in fp32: cpu, cuda:0, npu:0.
    """
    from illume_lightning.lit.device import choose_device
    from illume_lightning.nn.parity import run, table

    checks = run(directory, str(choose_device(device)))
    sys.stdout.write(table(checks) + "\n")
    if not all(check.passed for check in checks):
        raise SystemExit(1)


def doctor(run: str | None = None) -> None:
    """Print versions, devices, caches, and what is missing with the way to get it; or whether a run is in order.

    Args:
        run: folder of a run, written after doctor: its checkpoints are read in full, and exit status is 1 if something
            is wrong.
    """
    if run is not None:
        from illume_lightning.run_check import check_run

        text, is_well = check_run(run)
        sys.stdout.write(text)
        if not is_well:
            raise SystemExit(1)
        return
    from illume_lightning.doctor import report

    sys.stdout.write(report())
