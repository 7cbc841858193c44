"""What a run saves loads in a new process and thinks the same; what lacks something is an error."""

import json
from importlib.metadata import version

import processes
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from rollouts import ragged
from runs import lora, small_trainer
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, tiny_model
from transformers import GenerationConfig

from hrpo_patches import load_adapter
from hrpo_patches.models.adapter import load_plain_adapter
from hrpo_thinking.errors import InputError

LOAD = """
import hrpo_patches, sys, torch
from rollouts import ragged
from safetensors.torch import save_file
from tiny import byte_tokenizer
model, tokenizer = hrpo_patches.load_adapter(sys.argv[1], sys.argv[2]), byte_tokenizer()
out = model.generate(**ragged(tokenizer), tokenizer=tokenizer, do_sample=False, max_new_tokens=12,
                     return_dict_in_generate=True, output_logits=True)
save_file({"ids": out.sequences, "logits": torch.stack(out.logits), "states": out.thinking_states}, sys.argv[3])
print(out.thinking_residual)
"""


@pytest.fixture
def base(tmp_path):
    """A stock checkpoint on disk, as one has from the hub."""
    model = tiny_model("llama", thinking=False)
    model.config.thinking = None
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def trained(base, folder, **options):
    trainer = small_trainer(folder, model=str(base), max_steps=2, learning_rate=1e-2, **options)
    trainer.train()
    trainer.save_model()
    return trainer.model.eval()


def published(base, folder, residual="embedding"):
    """An adapter as the published HRPO runs left them: LoRA, gates and Λ, and no file of ours."""
    names = ["thinking_residual_gate_r", "thinking_residual_gate_i", "thinking_residual_Lambda"]
    model = get_peft_model(
        tiny_model("llama"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False, modules_to_save=names)
    )
    model.save_pretrained(folder)
    assert not any("projection" in key for key in load_file(folder / "adapter_model.safetensors"))
    return folder


def answer(model):
    tokenizer = byte_tokenizer()
    return model.generate(
        **ragged(tokenizer),
        tokenizer=tokenizer,
        thinking=True,
        do_sample=False,
        max_new_tokens=12,
        return_dict_in_generate=True,
        output_logits=True,
    )


def edit(folder, change):
    weights = load_file(folder / "adapter_model.safetensors")
    change(weights)
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("residual", ["projection", "embedding"])
def test_a_saved_adapter_answers_the_same_in_a_new_process(base, tmp_path, residual):
    model = trained(base, tmp_path / "run", residual=residual, answer_start="###")
    expected = answer(model)
    result = processes.run(LOAD, base, tmp_path / "run", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    out = load_file(tmp_path / "out")
    assert result.stdout.strip() == residual
    assert torch.equal(out["ids"], expected.sequences)
    torch.testing.assert_close(out["logits"], torch.stack(expected.logits))
    torch.testing.assert_close(out["states"], expected.thinking_states)


def test_the_folder_says_how_to_think(base, tmp_path):
    trained(base, tmp_path / "run", residual="embedding", answer_start="###")
    record = json.loads((tmp_path / "run" / "thinking_config.json").read_text())
    assert (record["residual"], record["answer_start"], record["hidden_size"]) == ("embedding", "###", 32)
    assert "thinking_projection" not in record["modules"]
    assert json.loads((tmp_path / "run" / "generation_config.json").read_text())["thinking"] is True
    model = load_adapter(str(base), tmp_path / "run")
    assert (model.config.thinking["residual"], model.config.thinking["answer_start"]) == ("embedding", "###")
    assert model.generation_config.thinking is True and not model.training
    assert GenerationConfig.from_pretrained(tmp_path / "run").thinking is True


def test_completions_end_where_they_ended_in_training(base, tmp_path):
    other = byte_tokenizer()
    other.eos_token = "!"
    trained(base, tmp_path / "run", tokenizer=other)
    ends = GenerationConfig.from_pretrained(tmp_path / "run").eos_token_id
    assert ends != GenerationConfig.from_pretrained(base).eos_token_id
    assert load_adapter(str(base), tmp_path / "run").generation_config.eos_token_id == ends


def test_thinking_weights_are_saved_in_float32_and_loaded_so_under_a_bf16_base(base, tmp_path):
    trained(base, tmp_path / "run", model_init_kwargs={"dtype": "bfloat16"})
    weights = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert {w.dtype for key, w in weights.items() if "thinking" in key} == {torch.float32}
    model = load_adapter(tiny_model("llama").to(torch.bfloat16), tmp_path / "run", is_trainable=True)
    key = "base_model.model.model.thinking_projection"
    assert torch.equal(model.get_parameter(f"{key}.modules_to_save.default.weight"), weights[f"{key}.weight"])


def test_training_goes_on_from_a_loaded_adapter(base, tmp_path):
    trained(base, tmp_path / "run")
    model = load_adapter(str(base), tmp_path / "run", is_trainable=True)
    trainer = small_trainer(tmp_path / "more", model=model, peft_config=None)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    assert before and all(not torch.equal(model.get_parameter(n), value) for n, value in before.items())


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_an_adapter_that_trained_biases_loads_with_them(tmp_path, bias):
    model = tiny_model("qwen2", thinking=False)
    model.config.thinking = None
    model.save_pretrained(tmp_path / "base")
    if bias == "lora_only" and Version(version("peft")) < Version("0.21"):
        with pytest.raises(InputError, match="does not save the biases"):
            trained(tmp_path / "base", tmp_path / "run", peft_config=lora(bias=bias))
        return
    expected = answer(trained(tmp_path / "base", tmp_path / "run", peft_config=lora(bias=bias)))
    found = answer(load_adapter(str(tmp_path / "base"), tmp_path / "run"))
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits))


def test_a_run_resumes_from_its_checkpoint(base, tmp_path):
    trainer = small_trainer(tmp_path, model=str(base), max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    again = small_trainer(tmp_path, model=str(base), max_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again.state.global_step == 2


def test_a_published_adapter_loads_with_the_embedding_residual(base, tmp_path):
    folder = published(base, tmp_path / "old")
    model = load_adapter(str(base), folder)
    out = answer(model)
    assert out.thinking_residual == "embedding"
    weights = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.thinking_residual_Lambda"
    assert torch.equal(model.get_parameter(f"{name}.modules_to_save.default.Lambda"), weights[f"{name}.Lambda"])


def test_the_projection_of_an_adapter_without_one_is_an_error_or_a_choice(base, tmp_path):
    folder = published(base, tmp_path / "old")
    with pytest.raises(InputError, match="has no thinking_projection .*--init_projection"):
        load_adapter(str(base), folder, residual="projection")
    model = load_adapter(str(base), folder, residual="projection", init_projection=True, is_trainable=True)
    assert answer(model.eval()).thinking_residual == "projection"
    names = [name for name, p in model.named_parameters() if p.requires_grad and "thinking_projection" in name]
    assert names == ["base_model.model.model.thinking_projection.modules_to_save.default.weight"]


def test_peft_loading_gates_without_a_projection_refuses_to_think_with_one(base, tmp_path):
    model = PeftModel.from_pretrained(tiny_model("llama"), str(published(base, tmp_path / "old")))
    with pytest.raises(InputError, match="gates but no thinking_projection"):
        answer(model)


@pytest.mark.parametrize("key", ["thinking_projection.weight", "gate_r.bias", "thinking_residual_Lambda.Lambda"])
def test_a_missing_thinking_weight_is_an_error(base, tmp_path, key):
    trained(base, tmp_path / "run")
    edit(tmp_path / "run", lambda weights: [weights.pop(name) for name in list(weights) if name.endswith(key)])
    with pytest.raises(InputError, match="thinking_projection|is missing"):
        load_adapter(str(base), tmp_path / "run")


def test_lora_that_is_missing_or_that_does_not_fit_is_an_error(base, tmp_path):
    trained(base, tmp_path / "run")
    edit(tmp_path / "run", lambda weights: weights.update({"base_model.model.extra.weight": torch.ones(1)}))
    with pytest.raises(InputError, match="extra.weight, which this base model has no place for"):
        load_adapter(str(base), tmp_path / "run")
    edit(tmp_path / "run", lambda weights: [weights.pop(k) for k in list(weights) if "lora_B" in k or "extra" in k])
    with pytest.raises(InputError, match="lora_B.* is missing.*the adapter was trained on .*; load that one"):
        load_adapter(str(base), tmp_path / "run")


def state_of(model):
    """All that loading an adapter could change of a base model."""
    parts = {name: type(module) for name, module in model.named_modules()}
    weights = {name: (p.requires_grad, p.data_ptr()) for name, p in model.named_parameters()}
    attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
    return parts, weights, attributes, model.config.to_dict(), model.generation_config.to_dict()


@pytest.mark.parametrize("plain", [False, True], ids=["thinking", "plain"])
@pytest.mark.parametrize("thinking", [False, {}], ids=["plain base", "thinking base"])
def test_an_adapter_that_does_not_load_leaves_the_base_as_it_was(base, tmp_path, plain, thinking):
    trained(base, tmp_path / "run", **({"residual": None} if plain else {"thinking": {"projection_layers": 2}}))
    load = load_plain_adapter if plain else load_adapter
    model = tiny_model("llama", thinking=thinking)
    before = state_of(model)
    damages = [lambda weights: weights.update({"base_model.model.extra.weight": torch.ones(1)})]
    damages += [lambda weights: [weights.pop(k) for k in list(weights) if "lora_B" in k or "extra" in k]]
    if not plain:
        damages += [lambda weights: [weights.pop(k) for k in list(weights) if "Lambda" in k]]
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    for damage in damages:
        edit(tmp_path / "run", damage)
        with pytest.raises(InputError):
            load(model, tmp_path / "run")
        assert state_of(model) == before
    save_file(saved, tmp_path / "run" / "adapter_model.safetensors", {"format": "pt"})
    assert isinstance(load(model, tmp_path / "run"), PeftModel)


def test_a_plain_adapter_with_pauses_ends_where_it_ended_in_training(base, tmp_path):
    other = byte_tokenizer()
    other.eos_token = "!"
    ends = trained(base, tmp_path / "run", residual=None, thoughts=2, tokenizer=other).generation_config.eos_token_id
    model = load_plain_adapter(tiny_model("llama", thinking=False), tmp_path / "run")
    assert model.generation_config.eos_token_id == ends and model.generation_config.thoughts == 2
    assert ends != GenerationConfig.from_pretrained(base).eos_token_id


def test_a_damaged_thinking_config_is_an_error(base, tmp_path):
    trained(base, tmp_path / "run")
    (tmp_path / "run" / "thinking_config.json").write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        load_adapter(str(base), tmp_path / "run")


def test_an_adapter_that_is_switched_off_does_not_think(base, tmp_path):
    model = trained(base, tmp_path / "run")
    with model.disable_adapter(), pytest.raises(InputError, match="switched off"):
        answer(model)
    with pytest.raises(InputError, match="already has an adapter"):
        load_adapter(model, tmp_path / "run")


def test_an_adapter_of_another_base_is_refused(base, tmp_path):
    trained(base, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "thinking_config.json").read_text())
    (tmp_path / "run" / "thinking_config.json").write_text(json.dumps(record | {"hidden_size": 64}))
    with pytest.raises(InputError, match="hidden size 64, not 32"):
        load_adapter(str(base), tmp_path / "run")
    edit(
        tmp_path / "run",
        lambda weights: weights.update({k: v[:16].clone() for k, v in weights.items() if "thinking" in k}),
    )
    (tmp_path / "run" / "thinking_config.json").unlink()
    with pytest.raises(InputError, match="belongs to another base model"):
        load_adapter(str(base), tmp_path / "run")


def test_a_folder_without_thinking_is_refused(base, tmp_path):
    with pytest.raises(InputError, match=r"adapter_config\.json is missing"):
        load_adapter(str(base), tmp_path)
    get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "plain")
    with pytest.raises(InputError, match="holds no thinking weights"):
        load_adapter(str(base), tmp_path / "plain")
