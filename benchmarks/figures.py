"""Writes the measured figures of README.md and docs/ from the records in benchmarks/results/: `make figures`.

A figure stands between `<!-- figures: NAME -->` and `<!-- /figures -->`, where NAME is a function of this file. A test
holds the pages against what the records give, so a figure changes with its record and in no other way.
"""

import json
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from illume_lightning.report import words  # noqa: E402
from illume_lightning.report.seed_tables import write_seeds  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/shapes_recipe.md", "docs/claims.md", "docs/scaling.md")

LIGHTNINGS = "Lightning's"

_BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- /figures -->)", re.DOTALL)
_WIDTH = 120
_TOGETHER = re.compile(r"`[^`]+`|[\d.]+ (?:%|dB|GiB|h|min|s)(?!\w)")

_CLAIMS = {
    "Order of tokens, guidance": ("generation", "pixel_first"),
    "Continuous input": ("understanding", "discrete_input"),
    "Token noise": ("tokenizer", "no_noise"),
}
"""Runs of experiments/ablations/claims that are held against one another."""


def rewrite(page: str) -> str:
    """A page's text with all its figures made from the records.

    Raises:
        FileNotFoundError: If a record is missing.
        ValueError: If a block has a name that no function here has.
    """

    def made(found: re.Match[str]) -> str:
        if found[2] not in BLOCKS:
            raise ValueError(f"no figures are called {found[2]!r}: there are {', '.join(BLOCKS)}")
        return f"{found[1]}{BLOCKS[found[2]]().strip()}\n{found[3]}"

    return _BLOCK.sub(made, page)


def without_figures(page: str) -> str:
    """A page's text outside of its blocks."""
    return _BLOCK.sub("", page)


def demo() -> str:
    """README: `make demo`, how long it takes and what it reaches."""
    about, state = record("demo/shapes/measured"), record("demo/shapes/state")
    stages = {step["name"]: step["seconds"] for step in state["steps"]}
    tokenizer, mllm = Sheet("demo/shapes/dualvitok"), Sheet("demo/shapes/mllm_stage3")
    questions = mllm.score("understanding", "all")
    rows = [
        (
            f"tokenizer, 112 px: PSNR, {tokenizer.score('shapes', 'psnr')['n']} pictures",
            tokenizer.shown("shapes", "psnr"),
            "",
        ),
        (
            "tokenizer: scenes that a checker without a learned model still reads right",
            tokenizer.shown("shapes", "scene"),
            "",
        ),
        (
            "questions about a picture, right word for word, 7 kinds equally often",
            mllm.shown("understanding", "all"),
            f"{chance(questions)}; same model without the picture "
            f"{share(questions['baselines']['without_picture'])}",
        ),
    ]
    for what, task, name in (
        ("captions, right word for word", "captioning", "all"),
        ("pictures from words: everything as asked", "generation", "scene"),
        ("of them, one object: its shape", "generation", "single_object"),
        ("edits: everything as asked, all else untouched", "editing", "edit"),
    ):
        rows.append((what, mllm.shown(task, name), chance(mllm.score(task, name))))
    head = (
        f"From an empty folder it takes {words.duration(sum(stages.values()))} after installation, on "
        f"{measured_on(about)}, seed {about['seed']} (`benchmarks/results/demo/shapes/`, commit {about['commit']}; "
        f"{about['remark']}). On held-out scenes of one to three objects, with 95 % limits:"
    )
    singles = [share(mllm.value("understanding", kind)) for kind in ("colour", "shape", "content")]
    foot = (
        f"It is a small model after {words.duration(stages['mllm_stage2'])} of its main stage. It still errs most "
        f'about single places (colour {singles[0]}, shape {singles[1]}, "what is at the ..." {singles[2]}). At other '
        f"aspect ratios it is weaker ({share(mllm.value('generation_ratios', 'scene'))} and "
        f"{share(mllm.value('editing_ratios', 'edit'))} of pictures and edits), pairs of colour and shape that it "
        f"never saw it does not put together ({share(mllm.value('generation_compositional', 'scene'))}), and the "
        f"diffusion decoder, trained for {words.duration(stages['diffusion_decoder'])}, is blurred."
    )
    return "\n\n".join([fill(head), table(("", ">score", ">by chance"), rows), fill(foot)])


def full() -> str:
    """README: the shapes world at its full setting."""
    about, state, mllm = (
        record("demo/shapes_full/measured"),
        record("demo/shapes_full/state"),
        Sheet("demo/shapes_full/mllm_stage3"),
    )
    quick = {step["name"]: step["command"] for step in record("demo/shapes/state")["steps"]}
    own = [step for step in state["steps"] if quick.get(step["name"]) != step["command"]]
    more = [step["command"] for step in own if step["command"][:2] == ["prepare", "shapes-conversations"]]
    count = sum(int(command[command.index("--count") + 1]) for command in more)
    understanding = {
        kind: share(mllm.value("understanding", kind)) for kind in ("colour", "shape", "existence")
    }
    ratios = [
        share(mllm.value(f"{task}_ratios", name))
        for task, name in (("generation", "scene"), ("editing", "edit"))
    ]
    return fill(
        f"The full setting, `{about['command']}`, goes on from there with {count:,} conversations more: "
        f"{words.duration(sum(step['seconds'] for step in own))}, on {measured_on(about)}, seed {about['seed']} "
        f"({about['remark']}; {mllm.settings['limit']} conversations of each task, "
        f"`benchmarks/results/demo/shapes_full/`, commit {about['commit']}): questions "
        f"{mllm.shown('understanding', 'all')}, of which colours of single places {understanding['colour']}, shapes "
        f'{understanding["shape"]}, "is there a ..." {understanding["existence"]}; captions '
        f"{mllm.shown('captioning', 'all')}, pictures {mllm.shown('generation', 'scene')}, edits "
        f"{mllm.shown('editing', 'edit')}; at other ratios {ratios[0]} and {ratios[1]} of pictures and edits; "
        f"colour-shape pairs never seen together {share(mllm.value('generation_compositional', 'scene'))}."
    )


def emoji() -> str:
    """README: what has been measured on emoji."""
    about = record("demo/emoji")
    return fill(
        f"`make emoji` trains DualViTok, decoder and MLLM on emoji; of it only {about['remark'].partition(';')[0]} has "
        f"been measured (`{about['command']}`, {words.duration(about['seconds'])} on {measured_on(about)}, commit "
        f"{about['commit']}): {about['psnr']['112']:.1f} dB at 112 px and {about['psnr']['224']:.1f} dB at 224 px "
        "(`benchmarks/results/demo/emoji.md`)."
    )


def speed() -> str:
    """README: the table of benchmarks."""
    rows = [
        simvq(),
        loader(),
        training_step(),
        linear_cross_entropy(),
        mllm_step(),
        generation(),
        decoder_speed(),
    ]
    names = ("simvq", "loader", "training_step", "linear_cross_entropy", "mllm_step", "generation", "decoder")
    head = (
        f"On {measured_on(*map(record, names))}; ratios are of one run. `make benchmark` and `make "
        "benchmark-generation` write `benchmarks/results/*.json`, and `make figures` what stands here."
    )
    return f"{fill(head)}\n\n{table(('what', 'command', 'result'), rows)}"


def simvq() -> tuple[str, ...]:
    """The row of the nearest code."""
    found = record("simvq")
    extra = found["extra_mib"]
    return (
        f"nearest code, {found['codes']:,} codes x {found['tokens']:,} tokens x {found['dim']}, fp32",
        f"`{found['command']}`",
        f"{found['speedup']:.1f}x faster than blockwise `cdist` + `argmin`, {extra['ours']:,.0f} MiB extra instead of "
        f"{extra['cdist']:,.0f} MiB, {share(found['share_of_torch_mm'])} of `torch.mm`'s FLOP/s; the fp32 product is "
        "the limit",
    )


def loader() -> tuple[str, ...]:
    """The row of the training loader."""
    found = record("loader")
    settings = found["settings"]
    return (
        f"training loader, {settings['size']} px JPEG, {settings['workers']} workers",
        f"`{found['command']}`",
        f"{share(found['share_of_raw_decode'])} of decoding the same bytes in a loop on {settings['workers']} "
        "processes; the rest is the third process on two cores",
    )


def training_step() -> tuple[str, ...]:
    """The row of DualViTok's training step."""
    found = record("training_step")
    settings, modes, speedup = found["settings"], found["modes"], found["speedup"]
    fp32, bf16, plain = (modes[name] for name in ("ours fp32", "ours bf16", "straightforward fp32"))
    return (
        f"training step of the medium config (encoder {settings['encoder_channels']}, decoder "
        f"{settings['decoder_channels']} channels, {settings['depth']} tower blocks), {settings['size']} px, batch "
        f"{settings['batch']}",
        f"`{found['command']}`",
        f"fp32 {median(fp32['seconds']):.1f} s against {median(plain['seconds']):.1f} s of a plain implementation, "
        f"{speedup['ours fp32']:.1f}x; bf16 {median(bf16['seconds']):.1f} s, {speedup['ours bf16']:.1f}x; "
        f"{fp32['peak_gib']:.1f} and {bf16['peak_gib']:.1f} GiB",
    )


def training_memory() -> str:
    """README: where the training step's gain comes from."""
    modes = record("training_step")["modes"]
    step = modes["ours fp32"]
    convolutions = sum(entry["seconds"] for entry in step["operators"] if "convolution" in entry["name"])
    without, kept = (
        median(modes[name]["seconds"])
        for name in ("ours fp32, memory not kept", "straightforward fp32, memory kept")
    )
    return fill(
        "Most of the step's gain is memory: `illume fit` on a CPU keeps freed blocks, which glibc would hand back and "
        f"the kernel would clear again (without that {without:.1f} s; the plain implementation with it {kept:.1f} s). "
        f"What is left are convolutions, {share(convolutions / median(step['seconds']))} of the fp32 step."
    )


def linear_cross_entropy() -> tuple[str, ...]:
    """The row of the MLLM's loss."""
    found = record("linear_cross_entropy")
    settings, seconds = found["settings"], found["median_seconds"]
    memory = {name: variant["extra_mib"] for name, variant in found["variants"].items()}
    ours, torchs = (
        (seconds[name] / seconds["full logits"], memory[name] / memory["full logits"])
        for name in ("ours", "torch chunked")
    )
    return (
        f"loss of {settings['tokens']:,} tokens over {settings['rows']:,} rows of width {settings['hidden']}, forward "
        "and backward, fp32",
        f"`{found['command']}`",
        f"{ours[0]:.2f}x the time and {ours[1]:.2f}x the extra memory of full logits; torch's own chunked one "
        f"{torchs[0]:.2f}x and {torchs[1]:.2f}x, so ours is used",
    )


def mllm_step() -> tuple[str, ...]:
    """The row of the MLLM's training step."""
    found = record("mllm_step")
    small, large, padding = found["shapes"], found["100M"], found["padding"]
    parts, all_of_it = small["parts_s"], sum(small["parts_s"].values())
    trunk = large["parts_s"]["trunk"] / sum(large["parts_s"].values())
    return (
        "training step of the MLLM, 32 conversations about shapes packed into rows of 512, bf16",
        f"`{found['command']}`",
        f"4-block trunk: trunk {share(parts['trunk'] / all_of_it)}, towers {share(parts['towers'] / all_of_it)}, loss "
        f"{share(parts['loss'] / all_of_it)}; packing {small['packing_speed_up']:.2f}x faster than padding "
        f"({share(padding['packed'], 1)} against {share(padding['padded'], 1)} padding); 100 M trunk: trunk "
        f"{share(trunk, 1)}, packing {large['packing_speed_up']:.2f}x",
    )


def generation() -> tuple[str, ...]:
    """The row of the generation engine."""
    found = record("generation")
    fp32, bf16 = found["float32"], found["bfloat16"]
    limits = [
        " to ".join(
            share(value["engine"]) for _, value in sorted(each["share_of_read_limit"].items(), reverse=True)
        )
        for each in (fp32, bf16)
    ]
    same = fp32["agreement"]["same"] == fp32["agreement"]["compared"]
    seconds = fp32["seconds_per_picture"]
    return (
        "a 256 px picture with guidance, 100 M parameter trunk, 283,047 ids, top-k, against transformers' `generate` "
        "with a processor that runs the unconditional branch beside it, on the same weights",
        f"`{found['command']}`",
        f"fp32 {seconds['engine']:.1f} s against {seconds['plain']:.1f} s, {fp32['speed_up']:.1f}x; bf16 "
        f"{bf16['seconds_per_picture']['engine']:.1f} s, {bf16['speed_up']:.1f}x; 8 at once "
        f"{fp32['throughput_batch_8_over_1']:.1f}x and {bf16['throughput_batch_8_over_1']:.1f}x the throughput of one; "
        f"{limits[0]} (fp32) and {limits[1]} (bf16) of the speed at which this memory can be read"
        + ("; same greedy ids in fp32" if same else ""),
    )


def decoder_speed() -> tuple[str, ...]:
    """The row of the diffusion decoder's sampling."""
    found = record("decoder")
    seconds, gain = found["seconds_per_picture"], found["two_forwards_over_one"].values()
    alone, batch = (
        [f"{seconds[f'{steps} steps, batch {size}, guidance 1']:.2f} s" for steps in (20, 50)]
        for size in (1, 8)
    )
    return (
        "sampling with the shapes decoder, 224 px, bf16",
        f"`{found['command']}`",
        f"20 steps {alone[0]} a picture alone, {batch[0]} in a batch of 8; 50 steps {alone[1]} and {batch[1]}; "
        f"guidance in one batched forward, {min(gain):.1f}x to {max(gain):.1f}x faster than in two",
    )


def unet() -> str:
    """README: memory of SDXL's UNet."""
    gib = record("decoder")["gib"]
    sampling = "sampling 1024 px, batch 1, {}bf16, activations"
    return fill(
        f"SDXL's UNet at full size, counted on the meta device (`python benchmarks/decoder.py`): weights "
        f"{gib['weights bf16']:.1f} GiB in bf16, and for a picture of 1024² {gib[sampling.format('')]:.2f} GiB more to "
        f"sample ({gib[sampling.format('guided, ')]:.2f} with guidance) and "
        f"{gib['training 1024 px, a picture, bf16, activations and gradients']:.1f} GiB to train (512²: "
        f"{gib['training 512 px, a picture, bf16, activations and gradients']:.1f}); with fp32 weights, gradients, "
        f"AdamW and EMA {gib['weights, gradients, AdamW and EMA fp32']:.0f} GiB."
    )


def decoder() -> str:
    """README: the diffusion decoder of `make demo`, trained for longer."""
    about, state = record("demo/decoder"), record("demo/shapes/state")
    step = Sheet("demo/shapes/diffusion_decoder").content["step"]
    seconds = {each["name"]: each["seconds"] for each in state["steps"]}["diffusion_decoder"]
    ours, plain, longer = about["diffusion"], about["dualvitok"], about["longer"]
    return fill(
        f"In `make demo` the decoder trains for {step} steps ({words.duration(seconds)}), which is too short to be "
        f"sharp. After {about['steps']:,} steps (`{about['command']}`, {words.duration(about['seconds'])} on "
        f"{measured_on(about)}, settings and tokenizer of commit {about['commit']}, "
        f"`benchmarks/results/demo/decoder.md`) the 2x output has {ours['psnr']:.1f} dB and a tower distance of "
        f"{ours['tower_distance']:.4f}, against {plain['psnr']:.1f} dB and {plain['tower_distance']:.4f} of the "
        f"bicubic enlargement of DualViTok's decode. With 10 % of the codes wrong it loses "
        f"{ours['psnr'] - ours['psnr_wrong10']:.1f} dB, DualViTok {plain['psnr'] - plain['psnr_wrong10']:.1f} dB. "
        "Outlines come closer to the originals (squares have straight sides again, stars five points); their edges are "
        f"about as soft, and SSIM is lower, {ours['ssim']:.2f} against {plain['ssim']:.2f}, for the faint texture that "
        f"remains. A longer run, {longer['steps']:,} steps, reaches {longer['psnr']:.1f} dB and "
        f"{longer['tower_distance']:.4f}, so this is not its end."
    )


def recipe() -> str:
    """docs/shapes_recipe.md: what each setting gives."""
    about = record("demo/recipe")
    rows = []
    for row in about["rows"]:
        limit = f" (chance {share(row['chance'])})" if "chance" in row else ""
        gives, instead = (quantity(row[key], row["unit"]) for key in ("gives", "instead"))
        rows.append((row["part"], row["what"], row["instead_of"], row["measured"], gives, instead + limit))
    head = f"On {measured_on(about)}, bf16, seed {about['seed']}, held-out scenes, {about['remark']}:"
    header = ("part", "what", "instead of", "measured", ">gives", ">instead")
    return f"{fill(head)}\n\n{table(header, rows)}"


def recipe_full() -> str:
    """docs/shapes_recipe.md: what is left when steps are not what is short."""
    quick, mllm = Sheet("demo/shapes/mllm_stage3"), Sheet("demo/shapes_full/mllm_stage3")
    existence = mllm.score("understanding", "existence")
    return fill(
        "The full setting (`experiments/shapes/schedule_full.yaml`, `benchmarks/results/demo/shapes_full/`) shows what "
        "is left when steps are not what is short: questions "
        f'{share(mllm.value("understanding", "all"))}, of which "is there a ..." {share(existence["value"])} (chance '
        f"{chance(existence)}; the quick run {share(quick.value('understanding', 'existence'))}) and captions "
        f"{share(mllm.value('understanding', 'caption'))}; scenes {share(mllm.value('generation', 'scene'))}, edits "
        f"{share(mllm.value('editing', 'edit'))}. Of new pairs of colour and shape, "
        f"{share(mllm.value('understanding_compositional', 'colour'))} of the colours and "
        f"{share(mllm.value('understanding_compositional', 'shape'))} of the shapes are named right, and "
        f"{share(mllm.value('generation_compositional', 'scene'))} of the pictures drawn right."
    )


def records() -> str:
    """README: which runs have records, and what came out when they were done again."""
    about = record("records/shapes/reproduced")
    seconds = {name: record(f"records/shapes/{name}/run")["seconds"] for name in about["verdicts"]}
    verdicts = "; ".join(
        f"`{name}`, {words.duration(seconds[name])}: {verdict}" for name, verdict in about["verdicts"].items()
    )
    return fill(
        f"Done again on {measured_on(about)}, commit {about['commit']}: {verdicts}. Another kind of processor rounds "
        "otherwise; `reproduce` then says how far apart the runs are, and where first."
    )


def training() -> str:
    """docs/scaling.md: what modules, a second process and checkpoints cost."""
    modules, processes, checkpoints = record("modules"), record("ddp"), record("checkpoints")
    overhead = ", ".join(f"{name} {found['ratio']:.2f}x" for name, found in measured_parts(modules))
    speed_up = ", ".join(f"{name} {found['speed_up']:.2f}x" for name, found in measured_parts(processes))
    seconds = {kind: min(found) for kind, found in checkpoints["seconds_per_gib"].items()}
    hashing = seconds["ours"] - seconds["ours, no hash"]
    return fill(
        f"On {measured_on(modules, processes, checkpoints)}: a training step of a module under the Trainer against a "
        f"bare loop of the same step, {overhead} (`{modules['command']}`); two processes of one core each against one, "
        f"the same batch, {speed_up} (`{processes['command']}`); a GiB of checkpoint, on the disk and with its "
        f"checksum, {seconds['ours']:.1f} s, of which the checksum {hashing:.1f} s, against "
        f"{seconds[LIGHTNINGS]:.1f} s of Lightning's, and in the background {seconds['background']:.1f} s that "
        f"training waits for (`{checkpoints['command']}`)."
    )


def measured_parts(found: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The models that a record of several has figures of."""
    return [(name, found[name]) for name in found["settings"]["parts"]]


def claims() -> str:
    """docs/claims.md: the tables, once there are results of the claims' schedule."""
    found = {
        title: sorted(
            path.parent for name in names for path in (RESULTS / "claims" / name).rglob("scores.json")
        )
        for title, names in _CLAIMS.items()
    }
    if not any(found.values()):
        return "Three seeds have not been run yet, so no table stands here."
    about = record("claims/measured")
    head = f"`{about['command']}`, on {measured_on(about)}, commit {about['commit']}."
    tables = [f"## {title}\n\n{write_seeds(runs)[0].strip()}" for title, runs in found.items() if runs]
    return "\n\n".join([fill(head), *tables])


class Sheet:
    """What `illume evaluate` found, as it was committed."""

    def __init__(self, name: str) -> None:
        self.content = record(name)
        self.settings = self.content["settings"]

    def score(self, task: str, name: str) -> dict[str, Any]:
        """One score."""
        (found,) = (each for each in self.content["scores"] if (each["task"], each["name"]) == (task, name))
        return found

    def value(self, task: str, name: str) -> float:
        """One score's value."""
        return self.score(task, name)["value"]

    def shown(self, task: str, name: str) -> str:
        """One score with its limits."""
        score = self.score(task, name)
        low, high = (quantity(score[key], score["unit"]).split()[0] for key in ("low", "high"))
        return f"{quantity(score['value'], score['unit'])} ({low} to {high})"


def record(name: str) -> dict[str, Any]:
    """A record of benchmarks/results, by its name without `.json`."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def measured_on(*records: dict[str, Any]) -> str:
    """Cores, processor and days of records, which must be of one machine.

    Raises:
        ValueError: If they are of several.
    """
    machines = {
        (
            f"{found['cores']} core{'s' if found['cores'] > 1 else ''} ({found['cpu']}, {found['capability']}, "
            f"{found['accelerator'] or 'no GPU'})"
        )
        for found in (each["hardware"] for each in records)
    }
    if len(machines) > 1:
        raise ValueError(f"these figures are of several machines: {', '.join(sorted(machines))}")
    days = sorted({each["date"][:10] for each in records})
    return f"{machines.pop()}, {' to '.join(dict.fromkeys((days[0], days[-1])))}"


def share(value: float, digits: int = 0) -> str:
    """In per cent."""
    return f"{100 * value:.{digits}f} %"


def chance(score: dict[str, Any]) -> str:
    """What guessing reaches, or giving the picture back."""
    baselines = score["baselines"]
    return share(baselines.get("chance", baselines.get("unchanged")))


def quantity(value: float, unit: str) -> str:
    """A score with its unit, short."""
    if unit == "share":
        return share(value)
    return f"{value:.2f} s" if unit == "s" else f"{value:.1f} {unit}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; columns whose heading begins with > stand to the right."""
    lines = [[name.removeprefix(">") for name in header], *rows]
    marks = "|".join("---:" if name.startswith(">") else "---" for name in header)
    first, *others = ("|" + "".join(f" {cell} |" if cell else " |" for cell in line) for line in lines)
    return "\n".join([first, f"|{marks}|", *others])


def fill(text: str) -> str:
    """A paragraph in lines of a page's width; code and a number with its unit stay on one line."""
    kept = _TOGETHER.sub(lambda found: found[0].replace(" ", words.SPACE), text)
    lines = textwrap.fill(kept, _WIDTH, break_long_words=False, break_on_hyphens=False)
    return lines.replace(words.SPACE, " ")


BLOCKS: dict[str, Callable[[], str]] = {
    block.__name__: block
    for block in (
        *(demo, full, emoji, speed, training_memory, unet, decoder, records),
        *(recipe, recipe_full, claims, training),
    )
}


if __name__ == "__main__":
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        (ROOT / page).write_text(rewrite(text), encoding="utf-8")
        print(f"{page}: {'changed' if rewrite(text) != text else 'as the records say'}")
