"""Trained runs in the official release's layouts, as far as their facts are known (docs/formats.md)."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from tokenizers import Tokenizer
from torch import nn

from illume_lightning.data.chat import EDIT, GENERATE, RANDOM, RECONSTRUCT, SYSTEM
from illume_lightning.data.schedule import Phase
from illume_lightning.data.text_tokenizer import END_OF_TEXT, END_OF_TURN, FILE, START_OF_TURN, TextTokenizer
from illume_lightning.lit.illume import sizes_of
from illume_lightning.lit.parts import SETTINGS, load_run
from illume_lightning.lit.prompts import Defaults
from illume_lightning.lit.saved_run import SavedRun
from illume_lightning.lit.tokenizer import PUBLISHED, load_tokenizer
from illume_lightning.nn.checkpoints import save_dualvitok
from illume_lightning.nn.diffusion_decoder import DiffusionDecoder, save_decoder
from illume_lightning.nn.mllm import MLLM
from illume_lightning.nn.mllm_checkpoints import save_mllm
from illume_lightning.nn.sharded_checkpoint import read_rest
from illume_lightning.vocabulary import Vocabulary

Dtype = Literal["float32", "bfloat16", "float16"]


def export_run(run: str | Path, out: str | Path, dtype: Dtype | None = None) -> None:
    """Write a run's model in the published layout; the folder appears only when all of it is written.

    An MLLM becomes a folder in origin format with a tokenizer that knows the vision tokens; low-rank matrices are
    merged into the layers beneath. A DualViTok becomes ``pytorch_model.bin``, a diffusion decoder a diffusers folder.

    Args:
        run: folder of a run, or one of its checkpoints.
        out: must not exist.
        dtype: of the weights; by default as trained. The release's MLLM is in bfloat16.

    Raises:
        FileNotFoundError: if the run, or the MLLM's text tokenizer, is missing.
        ValueError: if the folder exists, the run is of a part without a published layout, or its model does not
            fit that layout.
    """
    saved, out = SavedRun(run), Path(out)
    if out.exists():
        raise ValueError(f"{out} exists: choose another folder, or remove it")
    kinds = {"MLLMStage": _write_mllm, "DualViTok": _write_dualvitok, "DiffusionDecoder": _write_decoder}
    name = (saved.section("model", "class_path") or "").rpartition(".")[2]
    write = next((write for kind, write in kinds.items() if name.startswith(kind)), None)
    if write is None:
        raise ValueError(
            f"{run} is a run of {name or 'nothing that its configuration names'}: only runs of an MLLM stage, a "
            "DualViTok and a diffusion decoder have a published layout"
        )
    work = out.with_name(f"{out.name}.export")
    shutil.rmtree(work, ignore_errors=True)
    write(saved, work, getattr(torch, dtype) if dtype else None)
    work.rename(out)


def merge_lora(module: nn.Module) -> None:
    """Add low-rank matrices to the layers beneath them, which take their places."""
    for name, layer in list(module.named_modules()):
        if hasattr(layer, "lora_A"):
            layer.merge()
            module.set_submodule(name, layer.get_base_layer())


def _write_mllm(run: SavedRun, folder: Path, dtype: torch.dtype | None) -> None:
    mllm = load_run(run)
    merge_lora(mllm.trunk)
    data = run.section("data", "init_args")
    saved = read_rest(run.checkpoint)
    settings = {
        **sizes_of(Phase(**run.section("curriculum", "phases")[-1])),
        "release_prompts": bool(data.get("release_prompts")),
        "tokenizer_fingerprint": saved.get("tokenizer_fingerprint"),
    }
    text_tokenizer = TextTokenizer(data["text_tokenizer"])
    save_mllm(mllm.to(dtype), folder)
    _write_tokenizer(text_tokenizer, mllm.vocabulary, folder)
    _write_json(folder / "generation_config.json", _generation(text_tokenizer, Defaults()))
    config = json.loads((folder / "config.json").read_text())
    _write_json(folder / "config.json", config | {SETTINGS: settings})
    (folder / "README.md").write_text(_card(mllm, settings))


def _write_dualvitok(run: SavedRun, folder: Path, dtype: torch.dtype | None) -> None:
    model = load_tokenizer(run.checkpoint).to(dtype)
    folder.mkdir(parents=True)
    save_dualvitok(model, folder / PUBLISHED)
    # The release's file has no sizes; these are in this package's words.
    section = {"model": {"init_args": {"model": run.section("model", "init_args", "model")}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(section, sort_keys=False))


def _write_decoder(run: SavedRun, folder: Path, dtype: torch.dtype | None) -> None:
    decoder = run.fill(run.build(DiffusionDecoder, "model", "init_args", "decoder"))
    decoder.unet.to(dtype)
    save_decoder(decoder, folder)


def _write_tokenizer(text_tokenizer: TextTokenizer, vocabulary: Vocabulary, folder: Path) -> None:
    """The text tokenizer with the vision tokens behind its own, as plain added tokens (official release)."""
    tokenizer = Tokenizer.from_file(str(text_tokenizer.folder / FILE))
    tokenizer.add_tokens(list(vocabulary.tokens()))
    tokenizer.save(str(folder / FILE))
    extended = TextTokenizer(folder).vocabulary(
        vocabulary.semantic_codes, vocabulary.pixel_codes, vocabulary.size_step, vocabulary.num_sizes
    )
    if extended.num_text != vocabulary.num_text:
        raise ValueError(
            f"{text_tokenizer.folder / FILE} has {extended.num_text:,} text tokens, the model was trained with "
            f"{vocabulary.num_text:,}: put the text tokenizer of the training back there"
        )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": _CHAT_TEMPLATE,
        "eos_token": END_OF_TURN,
        "pad_token": END_OF_TEXT,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", settings)


_CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    f"{START_OF_TURN}system\n{SYSTEM}{END_OF_TURN}\n"
    "{% endif %}{% for message in messages %}"
    f"{START_OF_TURN}{{{{ message['role'] }}}}\n{{{{ message['content'] }}}}{END_OF_TURN}\n"
    "{% endfor %}{% if add_generation_prompt %}"
    f"{START_OF_TURN}assistant\n"
    "{% endif %}"
)


def _generation(text_tokenizer: TextTokenizer, defaults: Defaults) -> dict[str, Any]:
    """Sampling, by the names that the release's Hugging Face model takes."""
    # Without guidance: transformers' guidance_scale means something else to a language model.
    chat, made = defaults.chat.text, defaults.generate
    settings: dict[str, Any] = {
        "eos_token_id": [text_tokenizer.end_of_turn, text_tokenizer.end_of_text],
        "pad_token_id": text_tokenizer.end_of_text,
        "do_sample": chat.temperature > 0,
    }
    if chat.temperature > 0:
        settings |= {"temperature": chat.temperature, "top_k": chat.top_k, "top_p": chat.top_p}
    for name, segment in (("semantic", made.semantic), ("pixel", made.pixel)):
        settings |= {
            f"image_{name}_temperature": segment.temperature,
            f"image_{name}_top_k": segment.top_k,
            f"image_{name}_top_p": segment.top_p,
        }
    return settings


def _card(mllm: MLLM, settings: dict[str, Any]) -> str:
    """A model card to begin with."""
    config, vocabulary, defaults = mllm.trunk.config, mllm.vocabulary, Defaults()
    rows = {
        "language model": f"{config.num_hidden_layers} blocks of width {config.hidden_size}",
        "parameters": f"{sum(parameter.numel() for parameter in mllm.parameters()):,}",
        "vocabulary": f"{vocabulary.num_text:,} text tokens, {vocabulary.semantic_codes:,} semantic and "
        f"{vocabulary.pixel_codes:,} pixel codes",
        "pictures to make (height x width)": _sizes(settings["sizes"]),
        "pictures to look at": f"up to the area of {settings['max_side']} x {settings['max_side']} pixels",
        "codes by the DualViTok": settings["tokenizer_fingerprint"] or "none: no pictures were learned",
        "guidance": f"{defaults.generate.guidance} to make, {defaults.edit.guidance} to edit pictures",
    }
    prompts = {"make a picture": GENERATE, "edit a picture": EDIT}
    if settings["release_prompts"]:
        prompts |= {"unconditional, to make": RANDOM, "unconditional, to edit": RECONSTRUCT}
    lines = [
        "---",
        "library_name: illume-lightning",
        "---",
        "",
        "# An ILLUME+ MLLM",
        "",
        "Reads text and pictures, writes text and pictures. In the official release's origin format.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        "",
        "Prompts of a user's turn, with the picture's size tokens for `{resolution_tag}`:",
        "",
        *(f"- {name}: `{json.dumps(text)}`" for name, text in prompts.items()),
        "",
        "```python",
        "from illume_lightning import Illume",
        "",
        'illume = Illume.from_official("THIS_FOLDER", tokenizer="ITS_DUALVITOK")',
        'illume.generate("a red circle")[0].save("circle.png")',
        "```",
        "",
    ]
    return "\n".join(lines)


def _sizes(sizes: Sequence[Sequence[int]]) -> str:
    return ", ".join(f"{height} x {width}" for height, width in sizes)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
