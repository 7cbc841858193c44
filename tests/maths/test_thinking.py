"""The maths against its formulas, and the thinking weights on every way a model can come to life."""

import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from shared_fixtures import every_family
from tiny import tiny_config, tiny_model
from transformers import AutoModelForCausalLM

from hrpo_thinking.blend import projection_residual
from hrpo_thinking.config import ThinkingConfig
from hrpo_thinking.errors import InputError
from hrpo_thinking.inputs import ThinkingInputs
from hrpo_thinking.modules import initial_lambda
from hrpo_thinking.parts import MODULES, embedding_residual


def lambdas(model):
    return torch.exp(-8 * torch.nn.functional.softplus(-model.model.thinking_residual_Lambda.Lambda.detach().double()))


def assert_fresh(model, init_std=0.001, r_min=0.99, r_max=0.999):
    projection = model.model.thinking_projection.weight
    assert abs(projection.std().item() / init_std - 1) < 0.05 + 3 / math.sqrt(2 * projection.numel())
    assert r_min <= lambdas(model).min() and lambdas(model).max() <= r_max
    for name in MODULES:
        for parameter in getattr(model.model, name).parameters():
            assert parameter.isfinite().all() and parameter.dtype == torch.float32
    assert not torch.equal(model.model.thinking_residual_gate_r.weight, model.model.thinking_residual_gate_i.weight)


def test_the_blend_is_the_formula_of_the_paper_for_any_leading_shape(family):
    backbone = tiny_model(family).model
    for shape in [(32,), (5, 32), (2, 3, 32)]:
        e, s = torch.randn(shape), torch.randn(shape)
        r = torch.sigmoid(e @ backbone.thinking_residual_gate_r.weight.T + backbone.thinking_residual_gate_r.bias)
        i = torch.sigmoid(e @ backbone.thinking_residual_gate_i.weight.T + backbone.thinking_residual_gate_i.bias)
        a = torch.exp(-8 * torch.log1p(torch.exp(-backbone.thinking_residual_Lambda.Lambda)) * r)
        blended, share = backbone.thinking_residual(e, s)
        torch.testing.assert_close(share, a)
        torch.testing.assert_close(blended, a * e + torch.sqrt(1 - a**2 + 1e-8) * (i * s))


def test_a_is_lambda_to_the_power_of_the_gate():
    uniform, r = torch.rand(64), torch.rand(64).double()
    large = initial_lambda(uniform, 0.9, 0.99)
    a = torch.exp(-8 * torch.nn.functional.softplus(-large) * r)
    expected = (0.9 + 0.09 * (1e-4 + (1 - 2e-4) * uniform.double())) ** r
    torch.testing.assert_close(a, expected)


def test_the_projection_residual_has_unit_norm_whatever_the_scale_of_w():
    projected = torch.randn(4, 32)
    for scale in (1e-3, 1.0, 1e3):
        torch.testing.assert_close(projection_residual(projected * scale).norm(dim=-1), torch.ones(4))


def test_the_embedding_residual_is_the_expected_embedding_over_the_norm_of_p():
    p, table = torch.rand(3, 7).softmax(-1), torch.randn(7, 5)
    expected = sum(p[:, v, None] * table[v] for v in range(7)) / (p**2).sum(-1, keepdim=True).sqrt()
    torch.testing.assert_close(embedding_residual(p, table), expected)


def test_a_state_of_zeros_gives_finite_gradients(family):
    backbone = tiny_model(family).model
    embeds = torch.randn(1, 3, 32)
    out = backbone.blend_thinking(embeds, ThinkingInputs(torch.zeros(1, 3, 32), torch.tensor([[True, False, True]])))
    out.square().sum().backward()
    for name in MODULES:
        assert all(p.grad is None or p.grad.isfinite().all() for p in getattr(backbone, name).parameters())


def test_only_masked_positions_among_the_last_k_change(family):
    backbone = tiny_model(family).model
    embeds, states = torch.randn(2, 6, 32), torch.randn(2, 3, 32)
    mask = torch.tensor([[True, False, False], [False, True, True]])
    changed = (backbone.blend_thinking(embeds, ThinkingInputs(states, mask)) != embeds).any(-1)
    expected = torch.cat([torch.zeros(2, 3, dtype=torch.bool), mask], dim=1)
    assert torch.equal(changed, expected)


def test_a_thinking_forward_compiles_without_a_graph_break(family):
    model = tiny_model(family)
    arguments = {
        "input_ids": torch.randint(0, 200, (2, 6)),
        "thinking_inputs": ThinkingInputs(
            torch.randn(2, 3, 32), torch.tensor([[True, False, False], [False, True, True]])
        ),
        "output_last_hidden_state": True,
        "use_cache": False,
    }
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**arguments).logits, model(**arguments).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_from_a_config_starts_right_in_every_dtype(family, dtype):
    options = {"hidden_size": 128}
    config = tiny_config(family)
    for key, value in options.items():
        setattr(config, key, value)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    assert_fresh(model)
    assert_fresh(model.to(dtype))
    assert model.model.embed_tokens.weight.dtype == dtype


@pytest.mark.parametrize(
    ("family", "dtype", "device_map"),
    [
        ("llama", torch.float32, None),
        ("llama", torch.bfloat16, "cpu"),
        ("llama", torch.float16, {"": "cpu"}),
        ("qwen2", torch.float16, None),
        ("qwen2", torch.float32, "auto"),
        ("qwen3", torch.bfloat16, None),
        ("qwen3", torch.bfloat16, "auto"),
    ],
)
def test_a_checkpoint_without_thinking_weights_gets_fresh_ones(family, tmp_path, dtype, device_map, caplog):
    tiny_model(family, thinking=False).save_pretrained(tmp_path)
    options = {"r_min": 0.98, "r_max": 0.99, "init_std": 0.002}
    torch.manual_seed(1)
    with caplog.at_level("WARNING"):
        model, report = AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=dtype, device_map=device_map, thinking=options, output_loading_info=True
        )
    assert_fresh(model, **options)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert "thinking" not in caplog.text


@every_family
@pytest.mark.parametrize("asked", [{}, True])
def test_a_plain_checkpoint_thinks_with_the_defaults_where_it_is_asked_to(family, tmp_path, asked):
    tiny_model(family, thinking=None).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, thinking=asked)
    assert_fresh(loaded)
    assert loaded.config.thinking == ThinkingConfig().to_dict()
    assert loaded.generation_config.thinking is None
    assert tiny_model(family, thinking=asked).config.thinking == ThinkingConfig().to_dict()


@every_family
@pytest.mark.parametrize("unasked", [None, False])
def test_a_model_that_is_not_asked_to_think_is_plain(family, tmp_path, unasked):
    tiny_model(family, thinking=None).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, thinking=unasked)
    for model in (tiny_model(family, thinking=unasked), loaded, AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert not any("thinking" in name for name, _ in [*model.named_modules(), *model.state_dict().items()])
        assert "thinking" not in model.config.to_dict() and model.config.thinking is None


def test_modules_that_are_added_to_a_plain_model_are_fresh_and_leave_the_rest_alone(family):
    model = tiny_model(family, thinking=None).to(torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.model.begin_thinking(ThinkingConfig(r_min=0.98))
    assert_fresh(model, r_min=0.98)
    assert not model.model.thinking_projection.training
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_saving_changes_nothing_in_the_live_config(family, tmp_path):
    model = tiny_model(family)
    before = dict(model.config.thinking)
    model.save_pretrained(tmp_path)
    assert model.config.thinking == before and not before["in_checkpoint"]
    assert json.loads((tmp_path / "config.json").read_text())["thinking"] == before | {"in_checkpoint": True}


def test_a_checkpoint_whose_config_hides_its_thinking_weights_is_refused_unless_it_is_said_what_to_do(
    family, tmp_path
):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["thinking"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="holds thinking weights"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    thinking = AutoModelForCausalLM.from_pretrained(tmp_path, thinking={})
    assert torch.equal(thinking.model.thinking_projection.weight, model.model.thinking_projection.weight)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, thinking=False)
    assert not any("thinking" in name for name in plain.state_dict())


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thinking_weights_survive_a_full_save_bit_for_bit_in_float32(family, tmp_path, dtype):
    model = tiny_model(family).to(dtype)
    model.model.thinking_projection.weight.data.mul_(1.2345678)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_a_missing_thinking_weight_of_a_thinking_checkpoint_is_an_error(family, tmp_path):
    from safetensors.torch import load_file, save_file

    tiny_model(family).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.thinking_residual_gate_r.bias"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"thinking_residual_gate_r\.bias is missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("options", [{}, {"thinking": {"residual": "projection"}}])
def test_a_checkpoint_with_some_thinking_weights_is_damaged_whatever_its_config_says(tmp_path, options):
    from safetensors.torch import load_file, save_file

    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.thinking_residual_Lambda.Lambda"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="Lambda is missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path, **options)


def test_fresh_weights_are_drawn_in_float32_whatever_the_default_dtype():
    config = tiny_config("llama")
    config.hidden_size = 128
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    weight = model.model.thinking_projection.weight
    assert (weight != weight.bfloat16().float()).any()


def test_the_blend_is_float32_under_autocast():
    model = tiny_model("llama")
    embeds, states, mask = torch.randn(1, 3, 32), torch.randn(1, 3, 32), torch.ones(1, 3, dtype=torch.bool)
    expected = model.model.blend_thinking(embeds, ThinkingInputs(states, mask))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.model.blend_thinking(embeds, ThinkingInputs(states, mask)), expected)


def test_thinking_weights_on_the_meta_device_have_no_values_until_they_are_loaded(family):
    with torch.device("meta"):
        model = tiny_model(family)
    assert model.model.thinking_residual_Lambda.Lambda.device.type == "meta"
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter._is_hf_initialized = False
    for module in model.modules():
        module._is_hf_initialized = False
    model.init_weights()
    assert_fresh(model)


def test_the_thinking_modules_leave_the_base_weights_of_a_seed_alone(family):
    stock, ours = tiny_model(family, thinking=False), tiny_model(family)
    for key, value in stock.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key


def test_lambda_can_be_drawn_again(family):
    model = tiny_model(family)
    model.model.thinking_residual_Lambda.reset_lambda_parameters(0.5, 0.6)
    assert lambdas(model).min() >= 0.5 and lambdas(model).max() <= 0.6
    with pytest.raises(InputError, match="r_min"):
        model.model.thinking_residual_Lambda.reset_lambda_parameters(0.6, 0.5)


@pytest.mark.parametrize(
    ("states", "mask"), [((1, 3, 32), (1, 2)), ((1, 9, 32), (1, 9)), ((1, 3, 31), (1, 3)), ((3, 32), (3,))]
)
def test_thinking_inputs_that_do_not_fit_are_refused(states, mask):
    inputs = ThinkingInputs(torch.zeros(states), torch.ones(mask, dtype=torch.bool))
    with pytest.raises(InputError, match=r"expected states \(B, K, d\) and a mask \(B, K\) with 0 < K <= L"):
        tiny_model("llama")(torch.zeros(1, 5, dtype=torch.long), thinking_inputs=inputs)


@pytest.mark.parametrize(
    ("name", "wrapped"),
    [("thinking_states", False), ("thinking_mask", True), ("thinking_passes", False), ("bptt", True)],
)
def test_the_loose_keywords_of_before_are_refused_and_not_ignored(family, name, wrapped):
    model = tiny_model(family)
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"])) if wrapped else model
    with pytest.raises(InputError, match="since version 0.3"):
        model(input_ids=torch.zeros(1, 5, dtype=torch.long), **{name: torch.zeros(1, 3, 32)})


def test_thinking_inputs_to_a_model_without_thinking_are_refused():
    with pytest.raises(InputError, match="a plain model"):
        tiny_model("llama", thinking=None)(
            torch.zeros(1, 5, dtype=torch.long),
            thinking_inputs=ThinkingInputs(torch.zeros(1, 1, 32), torch.ones(1, 1, dtype=torch.bool)),
        )
