"""Every kind of projection: the same guarantees as the default's, and sentences for what does not go together."""

import itertools

import pytest
import torch
from peft import LoraConfig
from rollouts import bias, ragged, sample, worst
from runs import parse
from tiny import tiny_model
from transformers import AutoModelForCausalLM
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from hrpo_patches import load_adapter
from hrpo_patches.models.record import check_same_thinking, save_thinking
from hrpo_thinking.config import ThinkingConfig, about_parts
from hrpo_thinking.errors import InputError
from hrpo_thinking.inputs import ThinkingInputs
from hrpo_thinking.parts import MODULES, is_thinking_parameter

VALUES = {
    "residual": ["projection", "embedding"],
    "projection_layers": [1, 2],
    "projection_hidden": [None, 24],
    "projection_norm": [False, True],
    "projection_dropout": [0.0, 0.5],
    "residual_scale": ["unit", "embedding"],
}
EVERY = [dict(zip(VALUES, combination, strict=True)) for combination in itertools.product(*VALUES.values())]


def is_legal(options):
    plain = all(options[name] == VALUES[name][0] for name in about_parts())
    width = options["projection_hidden"] is None or options["projection_layers"] == 2
    return width and (options["residual"] == "projection" or plain)


LEGAL = [options for options in EVERY if is_legal(options)]


def name_of(options):
    return "-".join(str(value) for value in options.values())


def test_the_matrix_is_what_it_claims_to_be():
    assert len(EVERY) == 64 and len(LEGAL) == 25


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *(("llama", options) for options in LEGAL),
        *((family, LEGAL[i]) for family in ("qwen2", "qwen3") for i in (0, -1)),
    ],
    ids=lambda value: value if isinstance(value, str) else name_of(value),
)
def test_every_legal_combination_replays_its_rollout_and_trains_every_weight(tokenizer, family, options):
    model = tiny_model(family, thinking={"r_min": 0.3, "r_max": 0.6} | options)
    inputs = ragged(tokenizer)
    out = sample(model, tokenizer, inputs)
    assert out.thinking_residual == options["residual"] and out.thinking_mask.any()
    assert worst(model, out, inputs, biases=bias(tokenizer)) < 1e-4
    shifted = torch.roll(out.thinking_states, -1, 1)
    assert worst(model, out, inputs, states=shifted, biases=bias(tokenizer)) > 2e-3

    model.train()
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(out.thinking_mask).long()], 1)
    thinking = ThinkingInputs(out.thinking_states, out.thinking_mask)
    model(out.sequences, attention_mask=mask, thinking_inputs=thinking).logits.square().mean().backward()
    used = [m for m in MODULES if options["residual"] == "projection" or m != "thinking_projection"]
    named = [(n, p) for n, p in model.model.named_parameters() if any(n.startswith(f"{m}.") for m in used)]
    # A LayerNorm's bias starts at 0 and moves; the scale of what is normalised after it does not matter at the start.
    assert len(named) >= len(used)
    for name, parameter in named:
        assert parameter.dtype == torch.float32 and parameter.grad.norm() > 0, name


@pytest.mark.parametrize("options", [options for options in EVERY if not is_legal(options)], ids=name_of)
def test_every_illegal_combination_is_one_sentence_at_config_time(options):
    with pytest.raises(InputError, match="cannot be combined with residual='embedding'|needs projection_layers=2"):
        ThinkingConfig(**options)
    with pytest.raises(InputError):
        parse([f"--{name}={value}" for name, value in options.items() if value is not None])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projection_layers": 3}, r"projection_layers must be one of \(1, 2\), not 3"),
        ({"projection_layers": 2, "projection_hidden": 0}, "projection_hidden must be above 0"),
        ({"projection_norm": "yes"}, "projection_norm must be True or False"),
        ({"projection_dropout": 1.0}, "projection_dropout must be 0 or more and below 1"),
        ({"residual_scale": "big"}, "residual_scale must be one of"),
        ({"embedding_norm": -1.0}, "embedding_norm must be above 0"),
    ],
)
def test_a_value_that_cannot_be_is_one_sentence(options, message):
    with pytest.raises(InputError, match=message):
        ThinkingConfig.from_dict(options)


def test_plain_grpo_refuses_options_of_the_projection():
    with pytest.raises(InputError, match="--projection_layers is about the projection"):
        parse(["--residual", "none", "--projection_layers", "2"])


def test_the_default_is_the_published_layer_under_its_published_name(family):
    default, dropped = (tiny_model(family, thinking=options) for options in ({}, {"projection_dropout": 0.5}))
    names = {name for name in default.state_dict() if "thinking_projection" in name}
    assert names == {"model.thinking_projection.weight"}
    assert default.state_dict().keys() == dropped.state_dict().keys()


def test_dropout_acts_in_a_differentiated_training_forward_and_nowhere_else():
    model = tiny_model("llama", thinking={"projection_dropout": 0.5}).model
    states = torch.randn(2, 5, 32)
    with torch.no_grad():
        expected = model.eval().projected_residual(states)
        assert torch.equal(model.train().projected_residual(states), expected)
    assert torch.equal(model.eval().projected_residual(states), expected)
    dropped = model.train().projected_residual(states)
    assert ((dropped == 0).float().mean() - 0.5).abs() < 0.1
    assert torch.allclose(dropped.norm(dim=-1), torch.ones(2, 5))


def test_the_scale_is_that_of_the_mean_embedding_measured_once_and_saved(tmp_path):
    model = tiny_model("llama", thinking={"residual_scale": "embedding"})
    expected = model.get_input_embeddings().weight.norm(dim=-1).mean().item()
    residual = model.model.projected_residual(torch.randn(3, 32))
    assert torch.allclose(residual.norm(dim=-1), torch.full((3,), expected), rtol=1e-4)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)
    assert model.model.embedding_norm() == pytest.approx(expected)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.model.embedding_norm() == pytest.approx(expected)


VARIANTS = [
    {"projection_layers": 2, "projection_hidden": 24, "projection_norm": True},
    {"projection_norm": True, "residual_scale": "embedding"},
]


@pytest.mark.parametrize("options", VARIANTS, ids=name_of)
def test_a_variant_is_saved_and_loaded_in_float32_under_a_bf16_base(tmp_path, family, options):
    model = tiny_model(family, thinking=options).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name
        assert parameter.dtype == (torch.float32 if is_thinking_parameter(name) else torch.bfloat16), name
    with pytest.raises(InputError, match="were trained with projection_(norm=True, not False|layers=2, not 1)"):
        from hrpo_patches.models.base import thinking_options

        thinking_options(tmp_path, ThinkingConfig().to_dict())


@pytest.mark.parametrize("options", VARIANTS, ids=name_of)
def test_an_adapter_brings_its_kind_of_projection_to_a_base_that_has_another(tmp_path, tokenizer, options):
    from peft import get_peft_model

    model = get_peft_model(
        tiny_model("llama", thinking=options), LoraConfig(target_modules=["q_proj"], modules_to_save=list(MODULES))
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path)
    save_thinking(model, tmp_path)
    again = load_adapter(tiny_model("llama"), tmp_path)
    assert {name: again.config.thinking[name] for name in options} == options
    inputs = ragged(tokenizer)
    first, second = (sample(m.eval(), tokenizer, inputs, biased=False) for m in (model, again))
    assert torch.equal(first.sequences, second.sequences)
    assert torch.equal(first.thinking_states, second.thinking_states)

    soft = load_adapter(tiny_model("llama"), tmp_path, residual="embedding")
    assert sample(soft, tokenizer, inputs, biased=False).thinking_residual == "embedding"
    wanted = ThinkingConfig(**options | {"projection_layers": 2, "projection_norm": False})
    with pytest.raises(InputError, match="was trained with --projection_"):
        check_same_thinking(tmp_path, None, wanted)
    check_same_thinking(tmp_path, None, ThinkingConfig(**options))


def test_weights_are_fresh_until_they_are_trained_or_loaded(tmp_path, family):
    from hrpo_thinking.modules import ThinkingModule

    options = {"projection_layers": 2, "projection_norm": True}
    drawn = tiny_model(family, thinking=options)
    parts = [part for part in drawn.modules() if isinstance(part, ThinkingModule)]
    assert len(parts) == 6 and all(part.is_fresh() for part in parts)
    drawn.model.thinking_residual_Lambda.reset_lambda_parameters(0.3, 0.6)
    assert drawn.model.thinking_residual_Lambda.is_fresh()
    with torch.no_grad():
        for part in parts:
            next(part.parameters()).add_(1e-4)
    assert not any(part.is_fresh() for part in parts)
    drawn.save_pretrained(tmp_path / "trained")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert not any(part.is_fresh() for part in loaded.modules() if isinstance(part, ThinkingModule))


@pytest.mark.parametrize(
    "options", [{}, {"projection_layers": 2, "projection_norm": True}], ids=["plain", "two layers"]
)
def test_quantizers_leave_every_thinking_weight_alone(options):
    model = tiny_model("llama", thinking=options)
    left_alone = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    assert should_convert_module("model.layers.0.self_attn.q_proj.weight", left_alone)
    names = [name for name, _ in model.named_parameters() if is_thinking_parameter(name)]
    for name in names:  # some quantizers ask by the parameter's name, some by its module's
        assert not should_convert_module(name, left_alone), name
        assert not should_convert_module(name.rpartition(".")[0], left_alone), name
