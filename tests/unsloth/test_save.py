"""Every way of saving through unsloth keeps the thinking weights, or says no before it writes."""

import json

import pytest
import torch
from programs import TARGETS, python
from safetensors.torch import load_file
from unsloth import FastLanguageModel

from hrpo_patches.errors import InputError
from hrpo_patches.thinking import MODULES

MERGED_ON_TRANSFORMERS = """
import hrpo_patches, sys, torch
from transformers import AutoModelForCausalLM
from rollouts import ragged
from safetensors.torch import save_file
from tiny import byte_tokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
assert model.config.thinking["in_checkpoint"] and model.generation_config.thinking
tokenizer = byte_tokenizer()
out = model.generate(**ragged(tokenizer), tokenizer=tokenizer, max_new_tokens=10, do_sample=False,
                     return_dict_in_generate=True)
assert out.thinking_mask.any()
save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, sys.argv[2])
"""


@pytest.fixture
def trained(load, family):
    """An adapter with weights of its own on a base that knows no thinking."""
    model = FastLanguageModel.get_peft_model(
        load(f"plain-{family}", torch.float32, thinking={"answer_start": "##"}),
        r=4,
        target_modules=TARGETS,
        modules_to_save=list(MODULES),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name or "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def copies(model):
    named = {name: p for name, p in model.named_parameters() if ".modules_to_save." in name}
    short = {n.removeprefix("base_model.model.").replace(".modules_to_save.default", ""): p for n, p in named.items()}
    assert len(short) == 6
    return {name: value.detach().cpu() for name, value in short.items()}


def test_a_saved_adapter_holds_them_and_the_marker(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    for name, value in copies(trained).items():
        assert torch.equal(weights[f"base_model.model.{name}"], value), name
    assert json.loads((tmp_path / "thinking_config.json").read_text())["answer_start"] == "##"


def test_a_merged_model_holds_them_in_float32_and_thinks_by_default(trained, tokenizer, tmp_path):
    trained.save_pretrained_merged(tmp_path / "merged", tokenizer, save_method="merged_16bit")
    python("-c", MERGED_ON_TRANSFORMERS, tmp_path / "merged", tmp_path / "seen")
    seen = load_file(tmp_path / "seen")
    for name, value in copies(trained).items():
        assert torch.equal(seen[name], value) and seen[name].dtype == torch.float32, name
    layer = trained.get_base_model().model.layers[0].mlp.up_proj
    merged = layer.base_layer.weight + layer.get_delta_weight("default")
    torch.testing.assert_close(seen["model.layers.0.mlp.up_proj.weight"], merged.cpu(), rtol=1e-3, atol=1e-3)
    again, _ = FastLanguageModel.from_pretrained(str(tmp_path / "merged"), 256, torch.bfloat16, load_in_4bit=False)
    for name, value in copies(trained).items():
        assert torch.equal(again.get_parameter(name).cpu(), value), name
    assert again.config.thinking["answer_start"] == "##"


@pytest.mark.parametrize("name", ["save_pretrained_gguf", "save_pretrained_torchao", "push_to_hub_merged"])
def test_a_save_that_would_lose_them_is_refused_before_it_writes(trained, tokenizer, tmp_path, name):
    with pytest.raises(InputError, match=f"{name} cannot keep the thinking weights, so nothing was written"):
        getattr(trained, name)(str(tmp_path / "out"), tokenizer)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [{"save_method": "merged_4bit_forced"}, {"save_method": "fp8"}, {"safe_serialization": False}],
)
def test_so_is_a_merge_into_another_format(trained, tokenizer, tmp_path, options):
    with pytest.raises(InputError, match="cannot keep the thinking weights, so nothing was written"):
        trained.save_pretrained_merged(str(tmp_path / "out"), tokenizer, **options)
    assert not (tmp_path / "out").exists()


def test_modules_that_were_never_trained_are_no_obstacle(load):
    from hrpo_patches.unsloth_save import trained_thinking

    model = load("plain-llama", torch.float32, thinking={})
    assert trained_thinking(model) == {}
    adapter = FastLanguageModel.get_peft_model(model, r=4, target_modules=TARGETS)
    assert trained_thinking(adapter) == {}
    assert len(trained_thinking(load("llama", torch.float32))) == 6
