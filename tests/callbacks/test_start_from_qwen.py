"""The first stage of the MLLM begins with a pretrained language model."""

import lightning as L
import pytest
import torch
from tiny_mllm import VOCABULARY, build_mllm
from transformers import Qwen2Config, Qwen2ForCausalLM

from callbacks import StartFromQwen
from illume_lightning.lit.mllm import MLLMStage1


@pytest.fixture
def qwen(tmp_path):
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=VOCABULARY.num_text,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(tmp_path / "qwen")
    return tmp_path / "qwen", model


def trainer(**options):
    return L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **options)


def test_it_fills_trunk_and_text_rows(qwen):
    folder, model = qwen
    stage = MLLMStage1(build_mllm())
    StartFromQwen(str(folder)).setup(trainer(), stage, "fit")
    state = stage.model.state_dict()
    assert torch.equal(state["embedding.text"], model.model.embed_tokens.weight)
    assert torch.equal(state["head.text"], model.lm_head.weight)
    assert torch.equal(state["trunk.layers.1.mlp.up_proj.weight"], model.model.layers[1].mlp.up_proj.weight)


def test_it_does_nothing_where_a_checkpoint_has_the_weights(qwen):
    stage = MLLMStage1(build_mllm())
    before = {key: value.clone() for key, value in stage.state_dict().items()}
    StartFromQwen(str(qwen[0])).setup(trainer(), stage, "validate")
    assert all(torch.equal(value, before[key]) for key, value in stage.state_dict().items())


def test_what_is_refused(qwen, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        StartFromQwen(str(tmp_path / "nowhere")).setup(trainer(), MLLMStage1(build_mllm()), "fit")
    with pytest.raises(ValueError, match="32"):
        StartFromQwen(str(qwen[0])).setup(trainer(), MLLMStage1(build_mllm(width=64)), "fit")
    with pytest.raises(ValueError, match="fills an MLLM stage, this is a LightningModule"):
        StartFromQwen(str(qwen[0])).setup(trainer(), L.LightningModule(), "fit")
