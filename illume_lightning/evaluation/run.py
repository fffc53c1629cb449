"""Evaluating one run: what it is, what it is held against, and whether that has been done before."""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Literal

import torch

from illume_lightning.data.conversation_store import ConversationStore
from illume_lightning.data.store import ImageStore, sha256
from illume_lightning.evaluation.held_out import read_held_out
from illume_lightning.evaluation.mllm import ROOM, score_task, score_text
from illume_lightning.evaluation.reconstruction import score_diffusion_decoder, score_tokenizer
from illume_lightning.evaluation.scores import Part, Results, ScoreSheet, read_scores, save_samples
from illume_lightning.evaluation.tables import latex, markdown
from illume_lightning.lit.conversation_data import ConversationDataModule, Conversations
from illume_lightning.lit.datamodule import ImageDataModule
from illume_lightning.lit.device import choose_device
from illume_lightning.lit.diffusion_decoder import load_diffusion_decoder
from illume_lightning.lit.illume import Illume
from illume_lightning.lit.planned_data import open_store
from illume_lightning.lit.saved_run import SavedRun
from illume_lightning.lit.tokenizer import load_tokenizer
from illume_lightning.lit.worker import Drawing
from illume_lightning.nn.sharded_checkpoint import read_rest, require_file
from illume_lightning.provenance import commit_name
from illume_lightning.run_json import find_run_json

log = logging.getLogger(__name__)

Split = Literal["test", "val"]

_PARTS: dict[str, Part] = {"mllm": "mllm", "decoder": "diffusion_decoder", "model": "dualvitok"}
"""What a run trains, by the argument of its module that only this part has; first match."""

_IMAGE_OPTIONS = ("val_sizes", "val_any_resolution", "val_ratios", "val_size_step", "val_batch_size")
_ROW_TOKENS = 4096
"""Longest row of training of runs that don't name it."""


@dataclass(frozen=True)
class Options:
    """How to evaluate."""

    tokenizer: str | None = None
    """DualViTok run, checkpoint or published file; by default the one that the run names."""
    limit: int = 256
    """Most conversations, or pictures at each size, of a store."""
    seed: int = 0
    """Of the drawing of pictures."""
    split: Split | None = None
    """Stores of the run to use; by default test where it names some, else val."""
    device: str = "auto"
    """Torch device."""
    dtype: str = "float32"
    """Of the language model."""
    slots: int = 32
    """Sequences that run side by side; a guided picture takes two."""
    drawing: Drawing = field(default_factory=Drawing)
    """Changes to the model's sampling."""


def evaluate_run(
    run: str | Path, options: Options, out: str | Path | None = None, again: bool = False
) -> tuple[ScoreSheet, bool]:
    """Score a run on its held-out data, and write what was found.

    Args:
        run: folder of an MLLM, DualViTok or diffusion decoder run, or one of its checkpoints.
        options: how.
        out: folder to write to; by default `scores` in the run's.
        again: evaluate also where the same evaluation has been made.

    Returns:
        What was found, and whether it is new; else it is read from the folder.

    Raises:
        FileNotFoundError: if the run, a store or a tokenizer is missing.
        ValueError: if an option is out of range, or the run can't be evaluated; says why.
    """
    start = time.perf_counter()
    if options.limit < 1:
        raise ValueError(
            f"limit is {options.limit}: evaluate at least 1 conversation or picture of each store"
        )
    saved = SavedRun(run)
    require_file(saved.checkpoint, "`illume evaluate`")
    part, folder = _part(saved), Path(out) if out is not None else saved.folder / "scores"
    kind = ConversationStore if part == "mllm" else ImageStore
    stores = {task: open_store(kind, path) for task, path in _stores(saved, options.split).items()}
    step, is_finished = _progress(saved)
    settings = _settings(saved, part, stores, options) | {"finished": is_finished}
    digest = sha256(saved.checkpoint)
    earlier = None if again else read_scores(folder)
    if earlier is not None and earlier.is_of(digest, options.seed, settings):
        return earlier, False
    if not is_finished:
        log.warning("%s is not finished: it is evaluated as it is after step %d", saved.folder, step)
    results = _SCORERS[part](saved, stores, options)
    if not results.scores:
        raise ValueError(f"nothing in {', '.join(stores)} could be evaluated: see the messages above")
    folder.mkdir(parents=True, exist_ok=True)
    samples = save_samples(results.shown, folder)
    seconds = round(time.perf_counter() - start, 1)
    today = date.today().isoformat()
    sheet = ScoreSheet(
        *(str(run), part, step, options.seed, digest, today, seconds, settings),
        *(tuple(results.scores), samples, *_trained(saved)),
    )
    (folder / "scores.md").write_text(markdown(sheet))
    (folder / "scores.tex").write_text(latex(sheet))
    sheet.write(folder)  # the last: it stands for all
    return sheet, True


# -- what a run is ---------------------------------------------------------------------------------------------


def _part(saved: SavedRun) -> Part:
    arguments = saved.section("model", "init_args") or {}
    for name, part in _PARTS.items():
        if name in arguments and (name != "model" or _is_tokenizer(saved)):
            return part
    kind = saved.section("model", "class_path") or "another part"
    raise ValueError(
        f"{saved.folder} is a run of {kind}: give one of an MLLM, a DualViTok or a diffusion decoder"
    )


def _is_tokenizer(saved: SavedRun) -> bool:
    """The vision encoder's run has a `model` too."""
    name = (saved.section("model", "class_path") or "").rpartition(".")[2]
    return name in ("", "DualViTokModule")


def _stores(saved: SavedRun, split: Split | None) -> dict[str, str]:
    """Folders of the held-out stores by task."""
    for name in (split,) if split else ("test", "val"):
        if found := saved.section("data", "init_args", name):
            return {task: store if isinstance(store, str) else store["path"] for task, store in found.items()}
    raise ValueError(
        f"{saved.folder} names no stores under data.init_args.{split or 'test or val'}: name held-out stores in the "
        f"run's YAML{', or choose another split' if split else ''}"
    )


def _progress(saved: SavedRun) -> tuple[int, bool]:
    """Training steps of the checkpoint, and whether they are all of the run."""
    content = read_rest(saved.checkpoint)
    step, steps = int(content.get("global_step", 0)), saved.section("trainer", "max_steps")
    return step, steps is None or step >= steps


def _trained(saved: SavedRun) -> tuple[str | None, str | None]:
    """Identity of the run and commit of its code, where it has a record."""
    record = find_run_json(saved.folder)
    return (None, None) if record is None else (record["identity"], commit_name(record["code"]))


def _settings(saved: SavedRun, part: Part, stores: dict[str, Any], options: Options) -> dict[str, Any]:
    """All that decides the scores beside the checkpoint and the seed."""
    settings: dict[str, Any] = {
        "run_seed": saved.section("seed_everything"),
        "limit": options.limit,
        "stores": {
            task: {"path": store.location, "fingerprint": store.manifest.fingerprint}
            for task, store in stores.items()
        },
        "device": choose_device(options.device).type,
    }
    if part != "dualvitok":
        settings["tokenizer"] = _tokenizer(saved, options)
    if part == "mllm":
        defaults = asdict(options.drawing.defaults())
        sampling = {name: defaults[name] for name in ("generate", "edit")}
        return settings | {"dtype": options.dtype, "slots": options.slots, "sampling": sampling}
    return settings


def _tokenizer(saved: SavedRun, options: Options) -> str | None:
    return options.tokenizer or saved.section("model", "init_args", "tokenizer")


# -- what it is held against -----------------------------------------------------------------------------------


def _score_mllm(saved: SavedRun, stores: dict[str, Any], options: Options) -> Results:
    illume = Illume.from_run(
        saved.checkpoint,
        _tokenizer(saved, options),
        device=options.device,
        dtype=getattr(torch, options.dtype),
        slots=options.slots,
        context=_row_tokens(saved) + ROOM,
        defaults=options.drawing.defaults(),
    )
    _conversations(saved, illume, stores, options).setup("test")  # refuses what does not fit the model
    tasks = {task: read_held_out(store, options.limit) for task, store in stores.items()}
    making = [name for name, task in tasks.items() if task.wishes]
    if making and illume.tokenizer is None:
        raise ValueError(
            f"{', '.join(making)} ask for pictures, and the run names no tokenizer: give the DualViTok run whose codes "
            "the model was trained on with --tokenizer"
        )
    results = Results()
    for name, task in tasks.items():
        start = time.perf_counter()
        results.add(score_task(illume, name, task, options.seed))
        if task.questions and not task.is_about_pictures:
            data = _conversations(saved, illume, {name: stores[name]}, options)
            results.scores.append(score_text(illume.mllm, name, data.test_dataloader()[0]))
        log.info("%s: %.0f s", name, time.perf_counter() - start)
    return results


def _conversations(
    saved: SavedRun, illume: Illume, stores: dict[str, Any], options: Options
) -> ConversationDataModule:
    return ConversationDataModule(
        str(illume.text_tokenizer.folder),
        illume.mllm.vocabulary,
        test={task: Conversations(store.location) for task, store in stores.items()},
        row_tokens=_row_tokens(saved),
        val_limit=options.limit,
        num_workers=0,
    )


def _row_tokens(saved: SavedRun) -> int:
    return saved.section("data", "init_args", "row_tokens") or _ROW_TOKENS


def _score_dualvitok(saved: SavedRun, stores: dict[str, Any], options: Options) -> Results:
    model = load_tokenizer(saved.checkpoint).to(choose_device(options.device))
    return score_tokenizer(model, _pictures(saved, stores, options), options.seed)


def _score_diffusion_decoder(saved: SavedRun, stores: dict[str, Any], options: Options) -> Results:
    path = _tokenizer(saved, options)
    if path is None:
        raise ValueError(
            f"{saved.folder} names no tokenizer: give the one that it was trained with, --tokenizer"
        )
    device = choose_device(options.device)
    tokenizer = load_tokenizer(path).to(device)
    module = load_diffusion_decoder(saved.checkpoint, tokenizer).to(device)
    return score_diffusion_decoder(module, _pictures(saved, stores, options), options.seed)


def _pictures(saved: SavedRun, stores: dict[str, Any], options: Options) -> ImageDataModule:
    """Held-out pictures at the sizes of the run's validation."""
    arguments = saved.section("data", "init_args")
    given = {name: arguments[name] for name in _IMAGE_OPTIONS if arguments.get(name) is not None}
    paths = {task: store.location for task, store in stores.items()}
    data = ImageDataModule(test=paths, val_limit=options.limit, num_workers=0, **given)
    data.setup("test")
    return data


_SCORERS: dict[Part, Callable[[SavedRun, dict[str, Any], Options], Results]] = {
    "mllm": _score_mllm,
    "dualvitok": _score_dualvitok,
    "diffusion_decoder": _score_diffusion_decoder,
}
