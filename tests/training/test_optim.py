"""Every trainable parameter is in exactly one group with its own learning rate, under every name it can have."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_model
from transformers import Trainer, TrainingArguments

from hrpo_patches import patch_trainer_optimizer
from hrpo_thinking.errors import InputError
from hrpo_thinking.parts import MODULES, group_of


def trainer_for(model, folder, **options):
    arguments = TrainingArguments(
        output_dir=str(folder), learning_rate=1e-5, weight_decay=0.1, report_to="none", use_cpu=True, **options
    )
    return Trainer(model=model, args=arguments)


def with_lora(model):
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=list(MODULES)))


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.thinking_projection.weight", "projection"),
        ("base_model.model.model.thinking_projection.modules_to_save.default.weight", "projection"),
        ("base_model.model.model.thinking_residual_Lambda.modules_to_save.default.Lambda", "Lambda"),
        ("module._orig_mod.model.thinking_residual_gate_r.bias", "gate"),
        ("_fsdp_wrapped_module.model.thinking_residual_gate_i.weight", "gate"),
        ("model.layers.0.mlp.gate_proj.weight", "base"),
        ("model.layers.0.thinking_projection_of_another_kind.weight", "base"),
    ],
)
def test_names_find_their_group(name, group):
    assert group_of(name) == group


@pytest.mark.parametrize("wrap", [lambda model: model, with_lora])
def test_each_trainable_parameter_is_in_one_group_with_its_rate(tmp_path, wrap):
    model = wrap(tiny_model("llama"))
    trainer = trainer_for(model, tmp_path)
    patch_trainer_optimizer(trainer, lr_residual_gate=2e-4, lr_residual_Lambda=3e-3, lr_thinking_projection=4e-4)
    optimizer = trainer.create_optimizer()
    rates = {"base": 1e-5, "gate": 2e-4, "Lambda": 3e-3, "projection": 4e-4}
    placed = [(id(p), group) for group in optimizer.param_groups for p in group["params"]]
    names = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
    assert sorted(i for i, _ in placed) == sorted(names)
    for i, group in placed:
        assert group["lr"] == rates[group_of(names[i])], names[i]
        decays = names[i].endswith("weight") and "norm" not in names[i] and group_of(names[i]) == "base"
        assert group["weight_decay"] == (0.1 if decays else 0.0), names[i]


def test_the_schedule_scales_every_group_by_the_same_factor(tmp_path):
    trainer = trainer_for(tiny_model("llama"), tmp_path, lr_scheduler_type="linear", max_steps=10)
    patch_trainer_optimizer(trainer)
    trainer.create_optimizer_and_scheduler(10)
    first = {group["name"]: group["lr"] for group in trainer.optimizer.param_groups}
    trainer.optimizer.step()
    trainer.lr_scheduler.step()
    assert {group["name"]: group["lr"] / first[group["name"]] for group in trainer.optimizer.param_groups} == {
        name: pytest.approx(0.9) for name in first
    }


def test_a_trainer_of_a_model_without_trainable_thinking_is_refused(tmp_path):
    for model in (tiny_model("llama", thinking=False), get_peft_model(tiny_model("llama"), LoraConfig())):
        with pytest.raises(InputError, match="no trainable thinking weights"):
            patch_trainer_optimizer(trainer_for(model, tmp_path))


def test_a_trainer_that_has_an_optimizer_is_refused(tmp_path):
    trainer = trainer_for(tiny_model("llama"), tmp_path)
    trainer.create_optimizer()
    with pytest.raises(InputError, match="already has an optimizer"):
        patch_trainer_optimizer(trainer)


def test_an_optimizer_with_groups_of_its_own_is_refused(tmp_path):
    trainer = trainer_for(tiny_model("llama"), tmp_path)
    patch_trainer_optimizer(trainer)
    trainer.optimizer_cls_and_kwargs = (torch.optim.SGD, {"params": [{"params": [torch.ones(1)], "rank": 4}]})
    with pytest.raises(InputError, match="AdamW"):
        trainer.create_optimizer()


def test_the_optimizer_of_the_arguments_and_its_options_are_kept(tmp_path):
    trainer = trainer_for(tiny_model("llama"), tmp_path, optim="adafactor", adam_beta1=0.7)
    patch_trainer_optimizer(trainer)
    assert type(trainer.create_optimizer()).__name__ == "Adafactor"
    trainer = trainer_for(tiny_model("llama"), tmp_path, adam_beta1=0.7)
    patch_trainer_optimizer(trainer)
    assert {group["betas"] for group in trainer.create_optimizer().param_groups} == {(0.7, 0.999)}
