"""Exported runs: read back they are the same model, and transformers reads the tokenizer."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from test_diffusion_decoder_module import build as build_decoder
from tiny_run import write_dualvitok_run, write_mllm_run, write_run
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

import cli
from illume_lightning import Illume
from illume_lightning.data.text_tokenizer import TextTokenizer, train_tokenizer
from illume_lightning.lit.export import export_run
from illume_lightning.lit.lora import LoRA
from illume_lightning.lit.prompts import Chat
from illume_lightning.lit.tokenizer import fingerprint, load_tokenizer
from illume_lightning.nn.diffusion_decoder import DiffusionDecoder, build_unet, load_decoder
from illume_lightning.nn.dualvitok import DualViTok
from illume_lightning.nn.latents import VAELatents
from illume_lightning.nn.mllm import MLLM

WORDS = "make a picture of a red circle on white, the lowest one; what is it? " * 4


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text tokenizer and DualViTok run."""
    folder = tmp_path_factory.mktemp("world")
    train_tokenizer([WORDS], folder / "text", 280)
    write_dualvitok_run(folder / "dualvitok")
    return folder


@pytest.fixture(scope="module")
def text(world: Path) -> TextTokenizer:
    return TextTokenizer(world / "text")


@pytest.fixture(scope="module")
def dualvitok(world: Path, tmp_path_factory: pytest.TempPathFactory) -> DualViTok:
    return write_dualvitok_run(tmp_path_factory.mktemp("again") / "dualvitok")


@pytest.fixture(scope="module")
def exported(
    world: Path, text: TextTokenizer, dualvitok: DualViTok, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    write_mllm_run(folder / "run", text, dualvitok, slot_grid=4)
    export_run(folder / "run", folder / "out")
    return folder


def logits(mllm: MLLM, ids: torch.Tensor) -> torch.Tensor:
    embeds = mllm.embed_tokens(ids, torch.zeros_like(ids))
    return mllm.head.logits(mllm.hidden(embeds, torch.arange(ids.shape[1])[None]))


def assert_same(ours: MLLM, theirs: MLLM) -> None:
    assert ours.vocabulary == theirs.vocabulary
    state = theirs.state_dict()
    assert ours.state_dict().keys() == state.keys()
    for key, value in ours.state_dict().items():
        assert torch.equal(value, state[key]), key
    for (name, buffer), (_, other) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        assert torch.equal(buffer, other), name
    ids = torch.arange(0, ours.vocabulary.size, 7)[None, :40]
    assert torch.equal(logits(ours, ids), logits(theirs, ids))


def test_what_was_exported_is_the_run(exported: Path, world: Path) -> None:
    run = Illume.from_run(exported / "run", world / "dualvitok", device="cpu", context=512)
    ours = Illume.from_official(exported / "out", world / "dualvitok", device="cpu", context=512)
    assert_same(ours.mllm, run.mllm)
    assert ours.prompts.sizes == run.prompts.sizes and ours.prompts.sizes[0] == (32, 32)
    assert ours.prompts.max_side == run.prompts.max_side == 64
    assert ours.prompts._release_prompts is False
    blank = Image.new("RGB", (40, 50), "red")
    content = [{"type": "image", "image": blank}, {"type": "text", "text": "what is it?"}]
    task = Chat([{"role": "user", "content": content}], max_tokens=8)
    replies = [event.reply for illume in (ours, run) for event in illume.run([task]) if event.reply]
    assert replies[0].text == replies[1].text
    assert ours.generate("a red circle")[0].tobytes() == run.generate("a red circle")[0].tobytes()


@pytest.mark.parametrize("tied", [False, True])
def test_low_rank_matrices_are_merged(
    world: Path, text: TextTokenizer, dualvitok: DualViTok, tmp_path: Path, tied: bool
) -> None:
    mllm = write_mllm_run(tmp_path / "run", text, dualvitok, LoRA(rank=2, alpha=4), tied=tied)
    export_run(tmp_path / "run", tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert not any("lora" in key or "base_layer" in key for key in weights)
    assert ("lm_head.weight" in weights) != tied
    ours = Illume.from_official(tmp_path / "out", world / "dualvitok", device="cpu", context=512)
    ids = torch.arange(40)[None]
    layer = mllm.trunk.layers[0].self_attn.q_proj
    assert not torch.equal(ours.mllm.trunk.layers[0].self_attn.q_proj.weight, layer.base_layer.weight)
    torch.testing.assert_close(logits(ours.mllm, ids), logits(mllm, ids), rtol=1e-3, atol=1e-3)


def test_a_run_with_dropout_speaks_without(text: TextTokenizer, dualvitok: DualViTok, tmp_path: Path) -> None:
    write_mllm_run(tmp_path / "run", text, dualvitok, LoRA(rank=2, alpha=4, dropout=0.9))
    mllm = Illume.from_run(tmp_path / "run", device="cpu", context=512).mllm
    ids = torch.arange(40)[None]
    assert torch.equal(logits(mllm, ids), logits(mllm, ids))
    assert not any(parameter.requires_grad for parameter in mllm.parameters())


def test_transformers_reads_the_tokenizer(exported: Path, text: TextTokenizer) -> None:
    vocabulary = text.vocabulary(64, 96, size_step=16)
    strings = list(vocabulary.tokens())
    ids = list(range(vocabulary.num_text, vocabulary.size))
    for theirs in (
        PreTrainedTokenizerFast(tokenizer_file=str(exported / "out" / "tokenizer.json")),
        AutoTokenizer.from_pretrained(exported / "out"),
    ):
        assert theirs.convert_tokens_to_ids(strings) == ids
        assert theirs("".join(strings), add_special_tokens=False).input_ids == ids
        assert theirs.decode(ids, skip_special_tokens=True) == "".join(strings)
        assert theirs(WORDS, add_special_tokens=False).input_ids == text.encode(WORDS)
        assert len(theirs) == vocabulary.size
    messages = [{"role": "user", "content": "what is it?"}]
    said = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    illume = Illume.from_official(exported / "out", device="cpu", towers=_towers(exported), context=512)
    prompt = illume.prompts.ask(Chat(messages)).request.prompt
    assert said == text.decode(prompt.ids)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (text.end_of_turn, text.end_of_text)
    defaults = GenerationConfig.from_pretrained(exported / "out")
    assert defaults.eos_token_id == [text.end_of_turn, text.end_of_text]
    assert (defaults.do_sample, defaults.image_pixel_top_k) == (False, 6144)


def _towers(exported: Path):
    illume = Illume.from_run(exported / "run", device="cpu", context=512)
    return illume.mllm.semantic_encoder, illume.mllm.pixel_encoder


def test_config_and_card(exported: Path, dualvitok: DualViTok) -> None:
    config = json.loads((exported / "out" / "config.json").read_text())
    ours = config["illume_lightning"]
    assert (config["hidden_size"], ours["max_side"], ours["sizes"][0]) == (32, 64, [32, 32])
    assert config["unfreeze_mm_vision_tower"] is True
    assert config["special_tokens_ids"][0] == config["text_token_num"]
    card = (exported / "out" / "README.md").read_text()
    assert ours["tokenizer_fingerprint"] in card
    assert "64 semantic and 96 pixel codes" in card
    assert not list(exported.glob("*.export")) and not list(exported.glob("*.partial"))


def test_half_size_files(exported: Path, world: Path, tmp_path: Path) -> None:
    export_run(exported / "run", tmp_path / "out", dtype="bfloat16")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    read = Illume.from_official(
        tmp_path / "out", world / "dualvitok", device="cpu", dtype=torch.bfloat16, context=512
    )
    run = Illume.from_run(exported / "run", device="cpu", dtype=torch.bfloat16, context=512)
    for mllm in (read.mllm, run.mllm):
        assert {value.dtype for value in mllm.parameters()} == {torch.bfloat16}
        assert mllm.trunk.rotary_emb.inv_freq.dtype == torch.float32
    assert_same(read.mllm, run.mllm)


def test_another_tokenizer_is_refused(exported: Path, world: Path, tmp_path: Path) -> None:
    write_dualvitok_run(tmp_path / "other")
    checkpoint = tmp_path / "other" / "checkpoints" / "last.ckpt"
    saved = torch.load(checkpoint, weights_only=True)
    saved["state_dict"]["model.pixel_quantizer.frozen_codebook"] += 1
    torch.save(saved, checkpoint)
    with pytest.raises(ValueError, match="trained on codes of another tokenizer"):
        Illume.from_official(exported / "out", tmp_path / "other", device="cpu", context=512)


def test_a_dualvitok_run(world: Path, dualvitok: DualViTok, tmp_path: Path) -> None:
    cli.main(["export", str(world / "dualvitok"), str(tmp_path / "out")])
    state = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert state.keys() == dualvitok.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in dualvitok.state_dict().items())
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert config["model"]["init_args"]["model"]["class_path"] == "tiny.build_tiny"
    for path in (tmp_path / "out", tmp_path / "out" / "pytorch_model.bin"):
        assert fingerprint(load_tokenizer(path)) == fingerprint(dualvitok)


def build_with_vae(vae: str) -> DiffusionDecoder:
    unet = build_unet(4, 16, [16, 32], [0, 1], 16, 8, 4, 4, 4)
    module = build_decoder(Path("nowhere")).model
    return DiffusionDecoder(unet, VAELatents(vae), module.scheduler)


def build_without_vae() -> DiffusionDecoder:
    return build_decoder(Path("nowhere")).model


def test_a_diffusion_decoder_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1).save_pretrained(
        tmp_path / "vae"
    )
    decoder = build_with_vae(str(tmp_path / "vae"))
    part = {"class_path": "test_export.build_with_vae", "init_args": {"vae": str(tmp_path / "vae")}}
    module = {
        "class_path": "illume_lightning.lit.diffusion_decoder.DiffusionDecoderModule",
        "init_args": {"decoder": part},
    }
    write_run(tmp_path / "run", decoder, {"model": module})
    export_run(tmp_path / "run", tmp_path / "out", dtype="bfloat16")
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet", torch_dtype=torch.float32)
    for key, value in unet.state_dict().items():
        assert torch.equal(value, decoder.unet.state_dict()[key].bfloat16().float()), key
    assert load_decoder(str(tmp_path / "out"), 16).condition_channels == 16
    module["init_args"]["decoder"] = {"class_path": "test_export.build_without_vae"}
    write_run(tmp_path / "without", build_without_vae(), {"model": module})
    with pytest.raises(SystemExit):
        cli.main(["export", str(tmp_path / "without"), str(tmp_path / "other")])
    assert "has no VAE to write" in capsys.readouterr().err


def test_what_cannot_be_exported(
    exported: Path, world: Path, text: TextTokenizer, dualvitok: DualViTok, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="out exists: choose another folder"):
        export_run(exported / "run", exported / "out")
    with pytest.raises(FileNotFoundError, match="is no run"):
        export_run(tmp_path / "nowhere", tmp_path / "out")
    write_mllm_run(tmp_path / "discrete", text, dualvitok, discrete_input=True)
    with pytest.raises(ValueError, match="an MLLM with discrete_input or pixel_first can't be written"):
        export_run(tmp_path / "discrete", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run = Illume.from_run(tmp_path / "discrete", world / "dualvitok", device="cpu", context=512)
    assert run.mllm.discrete_input
    module = {"class_path": "illume_lightning.lit.vision_encoder.VisionEncoderModule"}
    write_run(tmp_path / "run", torch.nn.Linear(1, 1), {"model": module})
    with pytest.raises(ValueError, match="is a run of VisionEncoderModule: only runs of an MLLM stage"):
        export_run(tmp_path / "run", tmp_path / "out")
