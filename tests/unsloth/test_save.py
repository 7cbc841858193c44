"""Every way of saving through unsloth keeps the thinking weights, or says no before it writes."""

import copy
import json

import pytest
import torch
from programs import TARGETS, python
from safetensors.torch import load_file
from unsloth import FastLanguageModel

from hrpo_thinking.errors import InputError
from hrpo_thinking.parts import MODULES
from hrpo_patches.models.unsloth_saving import _REFUSED, trained_thinking

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


@pytest.mark.parametrize("name", _REFUSED)
def test_a_save_that_would_lose_them_is_refused_before_it_writes(trained, tokenizer, tmp_path, name):
    with pytest.raises(InputError, match=f"{name} cannot keep the thinking weights, so nothing was written"):
        getattr(trained, name)(str(tmp_path / "out"), tokenizer)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [{"save_method": "merged_4bit_forced"}, {"save_method": "fp8"}, {"safe_serialization": False}, {"variant": "x"}],
)
def test_so_is_a_merge_into_another_format(trained, tokenizer, tmp_path, options):
    with pytest.raises(InputError, match="cannot keep the thinking weights, so nothing was written"):
        trained.save_pretrained_merged(str(tmp_path / "out"), tokenizer, **options)
    assert not (tmp_path / "out").exists()


def test_options_at_their_defaults_are_no_obstacle_and_a_positional_one_that_matters_is(trained, tokenizer, tmp_path):
    with pytest.raises(InputError, match="nothing was written"):
        trained.save_pretrained_merged(tmp_path / "merged", tokenizer, "merged_16bit", True)  # push_to_hub
    trained.save_pretrained_merged(tmp_path / "merged", tokenizer, "merged_16bit", push_to_hub=False)
    assert (tmp_path / "merged" / "config.json").is_file()


def test_saving_lora_through_the_merge_says_how_it_thinks(trained, tokenizer, tmp_path):
    trained.save_pretrained_merged(tmp_path, tokenizer, save_method="lora")
    assert json.loads((tmp_path / "thinking_config.json").read_text())["answer_start"] == "##"
    with pytest.raises(InputError, match="a pickled adapter is not read again"):
        trained.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert not (tmp_path / "pickled").exists()


def test_a_deep_copy_saves_itself_and_not_what_it_was_copied_from(trained, tokenizer, tmp_path):
    copied = copy.deepcopy(trained)
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            if ".modules_to_save." in name or "lora_B" in name:
                parameter.add_(1)
    copied.save_pretrained(tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    expected = {
        name.replace(".modules_to_save.default", "").replace(".default", ""): p
        for name, p in copied.named_parameters()
        if ".modules_to_save." in name or "lora_" in name
    }
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], value.cpu()) for name, value in expected.items())
    copied.save_pretrained_merged(tmp_path / "merged", tokenizer)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(merged[name], value) for name, value in copies(copied).items())
    layer = copied.get_base_model().model.layers[0].mlp.up_proj
    product = layer.base_layer.weight + layer.get_delta_weight("default")
    torch.testing.assert_close(merged["model.layers.0.mlp.up_proj.weight"], product.cpu(), rtol=1e-3, atol=1e-3)


def test_an_adapter_of_another_name_is_merged_with_its_own_weights(trained, tokenizer, tmp_path, load, family):
    from peft import PeftModel
    from unsloth.save import patch_saving_functions

    trained.save_pretrained(tmp_path / "adapter")
    base = load(f"plain-{family}", torch.float32, thinking={"answer_start": "##"})
    mine = PeftModel.from_pretrained(base, tmp_path / "adapter", adapter_name="mine")
    patch_saving_functions(mine)
    mine.save_pretrained_merged(tmp_path / "merged", tokenizer)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert sum("thinking" in name for name in merged) == 6
    assert all(torch.equal(merged[name], value) for name, value in copies(trained).items())


def test_trained_weights_are_kept_without_a_peft_wrapper_too(trained, tokenizer, tmp_path, load):
    unloaded = trained.merge_and_unload()
    with pytest.raises(InputError, match="nothing was written"):
        unloaded.save_pretrained_gguf(str(tmp_path / "out"), tokenizer)
    model = load("plain-llama", torch.float32, thinking={})
    assert trained_thinking(model) == {}
    with torch.no_grad():
        model.model.thinking_residual_Lambda.Lambda.add_(1e-3)  # one optimizer step
    assert len(trained_thinking(model)) == 6


def test_an_adapter_on_a_plain_base_is_refused(trained, tmp_path, checkpoints, family):
    trained.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    base = checkpoints / f"plain-{family}"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(base)}))
    with pytest.raises(InputError, match="PEFT would lose it"):
        FastLanguageModel.from_pretrained(str(tmp_path / "adapter"), 256, torch.float32, load_in_4bit=False)


def test_modules_that_were_never_trained_are_no_obstacle(load):
    model = load("plain-llama", torch.float32, thinking={})
    assert trained_thinking(model) == {}
    adapter = FastLanguageModel.get_peft_model(model, r=4, target_modules=TARGETS)
    assert trained_thinking(adapter) == {}
    assert len(trained_thinking(load("llama", torch.float32))) == 6
