"""A full checkpoint that was written without its trained thinking weights gets them, in one file or in shards."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, tiny_model
from transformers import AutoModelForCausalLM

from hrpo_patches.models.checkpoint import add_thinking
from hrpo_thinking.errors import InputError
from hrpo_thinking.parts import is_thinking_parameter


def trained(family):
    named = tiny_model(family, seed=3).named_parameters()
    return {name: torch.randn_like(p) for name, p in named if is_thinking_parameter(name)}


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
@pytest.mark.parametrize("stale", [False, True])
def test_the_weights_are_loaded_as_they_were_and_the_rest_is_untouched(tmp_path, family, shard_size, stale):
    """`stale`: half of them are already there, rounded, as unsloth's merge leaves them."""
    weights = trained(family)
    plain = tiny_model(family, seed=3, thinking=False).to(torch.bfloat16)
    plain.save_pretrained(tmp_path, max_shard_size=shard_size)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert (len(shards) > 2) == (shard_size == "20KB")
    if stale:
        rounded = {name: value.bfloat16() for name, value in list(weights.items())[:3]}
        save_file(load_file(shards[0]) | rounded, shards[0], metadata={"format": "pt"})
    before = {name: value for shard in shards for name, value in load_file(shard).items()}
    add_thinking(tmp_path, weights, {"residual": "projection", "answer_start": "=>"})

    keys = [name for shard in shards for name in load_file(shard)]
    assert len(keys) == len(set(keys)) and sum(map(is_thinking_parameter, keys)) == 6
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, parameter in loaded.named_parameters():
        expected = weights[name] if name in weights else before[name]
        assert torch.equal(parameter, expected) and parameter.dtype == expected.dtype, name
    assert loaded.config.thinking["in_checkpoint"] and loaded.config.thinking["answer_start"] == "=>"
    inputs = byte_tokenizer()(["Hi"], return_tensors="pt")
    out = loaded.generate(**inputs, tokenizer=byte_tokenizer(), max_new_tokens=4, return_dict_in_generate=True)
    assert out.thinking_residual == "projection"
    assert not list(tmp_path.glob("*.building"))


def test_the_index_names_every_weight_once_and_the_shard_it_is_in(tmp_path):
    weights = trained("llama")
    tiny_model("llama", thinking=False).save_pretrained(tmp_path, max_shard_size="20KB")
    add_thinking(tmp_path, weights, {"residual": "projection"})
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    found = {name: shard.name for shard in tmp_path.glob("*.safetensors") for name in load_file(shard)}
    assert index == found


def test_a_folder_without_a_full_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no full model in safetensors"):
        add_thinking(tmp_path, {}, {})
