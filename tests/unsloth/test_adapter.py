"""FastLanguageModel's adapters around the thinking modules: float32, trainable, in place, whatever the base is."""

import pytest
import torch
from harness import ON_GPU
from programs import TARGETS
from probes import replay_inputs, thinking_gradients
from transformers import Trainer, TrainingArguments
from unsloth import FastLanguageModel

from hrpo_patches import load_adapter, patch_trainer_optimizer
from hrpo_thinking.errors import InputError
from hrpo_thinking.parts import MODULES
from hrpo_thinking.parts import is_thinking_parameter
from hrpo_patches.models.backends import backend_named
from hrpo_thinking.inputs import ThinkingInputs

LORA = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS}


def adapted(model, modules=MODULES, **options):
    return FastLanguageModel.get_peft_model(model, **LORA | options, modules_to_save=list(modules))


def check(model, dtype):
    """Four trainable float32 copies beside frozen originals, on the base's device."""
    named = {name: p for name, p in model.named_parameters() if is_thinking_parameter(name)}
    assert len(named) == 12
    for name, parameter in named.items():
        assert parameter.dtype == torch.float32, name
        assert parameter.requires_grad == (".modules_to_save." in name), name
        assert parameter.device == model.device, name
    assert model.get_input_embeddings().weight.dtype == dtype


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", torch.float32), ("llama", torch.float16), ("qwen2", torch.bfloat16), ("qwen3", torch.bfloat16)],
)
def test_the_copies_are_float32_and_trainable_through_every_switch(load, family, dtype):
    model = adapted(load(f"plain-{family}", dtype, thinking={}))
    check(model, dtype)
    FastLanguageModel.for_inference(model)
    check(model, dtype)
    FastLanguageModel.for_training(model)
    check(model, dtype)
    assert adapted(model) is model  # the same settings again pass through
    check(model, dtype)
    with pytest.raises(TypeError, match="new parameters are different"):
        adapted(model, modules=MODULES[:3])


def test_other_modules_are_refused_as_before(load):
    with pytest.raises(TypeError, match="Module = mlp is not allowed"):
        adapted(load("llama", torch.float32), modules=["mlp"])
    with pytest.raises(TypeError, match="Module = foo.thinking_projection is not allowed"):
        adapted(load("llama", torch.float32), modules=["foo.thinking_projection"])
    with pytest.raises(TypeError, match="Module = thinking_projection is not allowed"):
        adapted(load("llama", torch.float32, thinking=False), modules=["thinking_projection"])
    adapted(load("llama", torch.float32), modules=["model.thinking_projection"])


def test_a_model_by_name_is_refused_once_unsloth_has_changed_the_classes(load, checkpoints, tmp_path):
    adapted(load("plain-llama", torch.float32, thinking={})).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="load it with FastLanguageModel.from_pretrained"):
        load_adapter(str(checkpoints / "plain-llama"), tmp_path)


def test_more_positions_than_the_model_has_are_refused(checkpoints):
    with pytest.raises(InputError, match="may take 257 tokens, and the model has 256 positions"):
        backend_named("unsloth").load(checkpoints / "llama", torch.float32, 257)


def test_a_loaded_adapter_is_ready_to_train_or_frozen(load, tmp_path):
    trained = adapted(load("plain-llama", torch.bfloat16, thinking={"answer_start": "##"}))
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    trained.save_pretrained(tmp_path)
    for is_trainable in (True, False):
        base = load("plain-llama", torch.bfloat16, thinking={})
        again = load_adapter(base, tmp_path, is_trainable=is_trainable)
        assert again.config.thinking["answer_start"] == "##"
        assert "apply_lora_mlp" in again.get_base_model().model.layers[0].mlp.forward.__name__
        if is_trainable:
            check(again, torch.bfloat16)
            assert again.get_base_model().model.gradient_checkpointing
        else:
            assert not any(parameter.requires_grad for parameter in again.parameters()) and not again.training
        expected = {
            name: p for name, p in trained.named_parameters() if ".modules_to_save." in name or "lora_" in name
        }
        found = dict(again.named_parameters())
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_an_adapter_that_unsloth_loads_itself_is_ready_too(checkpoints, tmp_path):
    """On a base as it comes from the hub, whose config has never heard of thinking: it must be asked for."""
    base = checkpoints / "plain-llama"
    options = {"max_seq_length": 256, "dtype": torch.bfloat16, "load_in_4bit": False, "thinking": {}}
    adapted(FastLanguageModel.from_pretrained(str(base), **options)[0]).save_pretrained(tmp_path / "adapter")
    model, _ = FastLanguageModel.from_pretrained(str(tmp_path / "adapter"), **options)
    check(model, torch.bfloat16)
    assert adapted(model) is model


def lambda_gradient(model, dtype, tokenizer):
    """Λ with its gradient. Triton's interpreter multiplies bf16 wrongly, so there only the blend is run, in torch."""
    if dtype == torch.float16 or ON_GPU:
        thinking_gradients(model, replay_inputs(model, tokenizer))
    else:
        states = torch.randn(1, 8, model.config.hidden_size)
        embeds = model.get_input_embeddings()(torch.arange(8)[None])
        assert embeds.dtype == torch.bfloat16
        backbone = model.get_base_model().model
        thinking = ThinkingInputs(states, torch.ones(1, 8).bool())
        backbone.blend_thinking(embeds, thinking).float().square().sum().backward()
    return model.get_base_model().model.thinking_residual_Lambda.modules_to_save.default.Lambda


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_adamw_step_moves_every_element_of_lambda_that_has_a_gradient(load, tokenizer, tmp_path, dtype):
    model = adapted(load("plain-llama", dtype, thinking={}))
    trainer = Trainer(model, TrainingArguments(tmp_path, report_to=[], use_cpu=not ON_GPU))
    patch_trainer_optimizer(trainer)
    optimizer = trainer.create_optimizer()
    Lambda = lambda_gradient(model, dtype, tokenizer)
    before, has_gradient = Lambda.detach().clone(), Lambda.grad != 0
    optimizer.step()
    assert torch.isfinite(Lambda.grad).all() and has_gradient.float().mean() > 0.9
    assert torch.equal(Lambda != before, has_gradient)


def test_gradients_pass_the_fused_lora_kernels(load, family, tokenizer):
    """A float32 base takes none of them, and is what agrees with transformers; a float16 base takes them all."""
    gradients = {}
    for dtype in (torch.float32, torch.float16):
        model = adapted(load(family, dtype))
        FastLanguageModel.for_training(model)
        mlp = model.get_base_model().model.layers[0].mlp
        assert ("apply_lora_mlp" in mlp.forward.__name__) == (dtype == torch.float16)
        gradients[dtype] = thinking_gradients(model, replay_inputs(model, tokenizer))
    for name, value in gradients[torch.float32].items():
        difference = (gradients[torch.float16][name] - value).norm() / value.norm()
        assert value.norm() > 0 and difference < 0.02, (name, difference)


def test_gradients_pass_unsloths_gradient_checkpointing(load, tokenizer):
    gradients = {}
    for checkpointing in (False, "unsloth"):
        torch.manual_seed(0)
        model = adapted(load("llama", torch.float32), use_gradient_checkpointing=checkpointing)
        FastLanguageModel.for_training(model)
        assert bool(model.get_base_model().model.gradient_checkpointing) == bool(checkpointing)
        gradients[checkpointing] = thinking_gradients(model, replay_inputs(model, tokenizer))
    assert len(gradients[False]) == 6
    for name, value in gradients[False].items():
        assert value.norm() > 0
        torch.testing.assert_close(gradients["unsloth"][name], value, rtol=1e-4, atol=1e-5)
