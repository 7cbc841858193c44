"""What the monitor measures is what the formulas say, on a model whose numbers are known."""

import pytest
import torch
from peft import get_peft_model
from runs import lora
from tiny import tiny_model
from torch.nn.functional import cosine_similarity

from hrpo_patches.monitor import measures
from hrpo_patches.monitor.measures import effective_rank, gradient_norms, marker_rate, measure_blend, measure_weights
from hrpo_thinking.inputs import ThinkingInputs
from hrpo_thinking.parts import parts_of

TOKENS = torch.arange(40).view(2, 20)


@pytest.fixture
def model(family):
    torch.manual_seed(1)
    return tiny_model(family, thinking={"r_min": 0.5, "r_max": 0.9})


def inputs_of(model, mask):
    states = torch.randn(2, mask.shape[1], model.config.hidden_size)
    return {"input_ids": TOKENS, "attention_mask": None, "thinking_inputs": ThinkingInputs(states, mask)}


def test_the_effective_rank_counts_equal_directions():
    assert effective_rank(torch.eye(7)[:3]) == pytest.approx(3)
    assert effective_rank(torch.outer(torch.randn(5), torch.randn(4))) == pytest.approx(1, abs=1e-4)
    assert effective_rank(torch.randn(400, 400)) == pytest.approx(200, rel=0.05)
    sigma = torch.linalg.svdvals(weight := torch.randn(6, 9))
    assert effective_rank(weight) == pytest.approx((sigma**2).sum().item() ** 2 / (sigma**4).sum().item(), rel=1e-4)


def test_the_blend_is_measured_at_thinking_positions_only(model):
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, 2] = mask[1, 4] = True
    inputs = inputs_of(model, mask)
    values = measure_blend(model.model, model.lm_head, inputs, temperature=0.7)
    e = model.get_input_embeddings()(TOKENS[:, -6:][mask])
    state = inputs["thinking_inputs"].states[mask]
    a, s = model.model.thinking_decay(e), model.model.projected_residual(state)
    p = (model.lm_head(state) / 0.7).softmax(-1)
    other = p @ model.get_input_embeddings().weight  # the cosine does not see its scale
    gate = torch.sigmoid(model.model.thinking_residual_gate_i(e))
    expected = {
        **{"a/mean": a.mean(), "a/min": a.min(), "a/max": a.max()},
        **{"i/mean": gate.mean(), "i/min": gate.min(), "i/max": gate.max()},
        "cosine/token": cosine_similarity(s, e).mean(),
        "cosine/embedding": cosine_similarity(s, other).mean(),
    }
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        assert values[name] == pytest.approx(value.item(), abs=1e-5), name
    embeds = {key: value for key, value in inputs.items() if key != "input_ids"}
    embeds["inputs_embeds"] = model.get_input_embeddings()(TOKENS)
    assert measure_blend(model.model, model.lm_head, embeds, 0.7) == values


def test_a_finished_residual_is_compared_with_the_token_and_with_nothing_else(model):
    model.config.thinking["residual"] = "embedding"
    mask = torch.ones(2, 6, dtype=torch.bool)
    inputs = inputs_of(model, mask)
    values = measure_blend(model.model, model.lm_head, inputs)
    assert "cosine/embedding" not in values
    inputs["thinking_inputs"] = ThinkingInputs(model.get_input_embeddings()(TOKENS[:, -6:]), mask)
    assert measure_blend(model.model, model.lm_head, inputs)["cosine/token"] == pytest.approx(1, abs=1e-5)


def test_nothing_is_measured_where_nothing_thinks(model):
    assert measure_blend(model.model, model.lm_head, inputs_of(model, torch.zeros(2, 6, dtype=torch.bool))) == {}


def test_a_large_batch_costs_no_more_than_the_sample(model, monkeypatch):
    seen = []
    monkeypatch.setattr(measures, "RESIDUALS_AT", 3)
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    measure_blend(model.model, model.lm_head, inputs_of(model, torch.ones(2, 20, dtype=torch.bool)))
    assert seen == [(3, 32)]


def test_norm_drift_and_rank_are_those_of_the_trained_copy(model):
    peft_model = get_peft_model(model, lora(modules_to_save=parts_of("projection")))
    start = {name: weight.clone() for name, weight in measures.projection_weights(model.model).items()}
    weight = model.model.thinking_projection.modules_to_save.default.weight
    assert measure_weights(model.model, start)["projection/drift"] == 0
    before = weight.detach().clone()
    with torch.no_grad():
        weight.copy_(3 * before)
    values = measure_weights(peft_model.get_base_model().model, start)
    assert values["projection/drift"] == pytest.approx(2, rel=1e-5)
    assert values["projection/weight_norm"] == pytest.approx(3 * before.norm().item(), rel=1e-5)
    assert values["projection/effective_rank"] == pytest.approx(effective_rank(before).item(), rel=1e-4)
    assert 0.5 < values["decay/min"] < values["decay/mean"] < values["decay/max"] < 0.9
    assert values["Lambda/min"] == model.model.thinking_residual_Lambda.Lambda.min()


def test_gradients_are_measured_by_group(model):
    peft_model = get_peft_model(model, lora(modules_to_save=parts_of("projection")))
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad and "Lambda" not in name:
            parameter.grad = torch.ones_like(parameter)
    norms = gradient_norms(peft_model)
    assert norms.keys() == {"base/grad_norm", "gate/grad_norm", "projection/grad_norm"}
    assert norms["projection/grad_norm"] == pytest.approx(32)  # sqrt(32 * 32)
    assert norms["gate/grad_norm"] == pytest.approx((2 * (32 * 32 + 32)) ** 0.5)


def test_a_marker_is_a_real_position_that_no_longer_thinks():
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]]).bool()
    attention = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    inputs = {"thinking_inputs": ThinkingInputs(None, mask), "attention_mask": attention}
    assert marker_rate(inputs) == 0.25
    assert marker_rate({"thinking_inputs": ThinkingInputs(None, mask), "attention_mask": None}) == 0.5


def test_measuring_draws_no_random_numbers(model):
    inputs = inputs_of(model, torch.ones(2, 6, dtype=torch.bool))
    state = torch.get_rng_state()
    measure_blend(model.model, model.lm_head, inputs)
    measure_weights(model.model, measures.projection_weights(model.model))
    assert torch.equal(torch.get_rng_state(), state)
