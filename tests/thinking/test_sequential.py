"""Decoding one by one in the graph, where stretches are read at once and memory is saved."""

import pytest
import torch
from gradients import difference, gradients, replayed, rollout_of, thinking_model

from hrpo_patches.thinking import sequential
from hrpo_patches.thinking.controls import controlled


def test_long_stretches_without_thoughts_are_read_at_once(family, monkeypatch):
    model = thinking_model(family)
    tokens, attention, states, mask = rollout_of(model)
    mask = mask.clone()
    mask[:, :2] = False
    rollout = (tokens, attention, states, mask)
    expected = gradients(model, replayed(model, rollout, "sequential"))
    widths, advance = [], sequential.advance
    monkeypatch.setattr(
        sequential,
        "advance",
        lambda backbone, inputs, *rest: widths.append(inputs.shape[1]) or advance(backbone, inputs, *rest),
    )
    monkeypatch.setattr(sequential, "STRETCH", 5)
    assert difference(gradients(model, replayed(model, rollout, "sequential")), expected) < 1e-9
    assert widths[:2] == [5, 5] and widths[-4:] == [1, 1, 1, 1]


def test_many_thoughts_are_recomputed_to_the_same_gradient_under_the_control_of_their_forward(family, monkeypatch):
    model = thinking_model(family)
    rollout = rollout_of(model)
    expected = gradients(model, replayed(model, rollout, "sequential"))
    with controlled(model, "token"):
        under_control = gradients(model, replayed(model, rollout, "sequential"))
    monkeypatch.setattr(sequential, "KEPT", 3)
    assert difference(gradients(model, replayed(model, rollout, "sequential")), expected) < 1e-9
    with controlled(model, "token"):
        value = replayed(model, rollout, "sequential")
    found = gradients(model, value)  # the control is gone when the backward recomputes
    compared = {name: g for name, g in found.items() if under_control[name].norm() > 0}
    assert difference(compared, {name: under_control[name] for name in compared}) < 1e-9


def test_off_policy_its_values_are_todays_and_those_of_constants_the_rollouts(family):
    model = thinking_model(family)
    rollout = rollout_of(model)
    with torch.no_grad():
        model.model.thinking_projection.weight.add_(torch.randn(32, 32).double())
        today = replayed(model, (*rollout[:2], None, rollout[3]), 0).item()
    assert replayed(model, rollout, "sequential").item() == pytest.approx(today, rel=1e-6)
    assert abs(replayed(model, rollout, 0).item() - today) > 1e-3 * abs(today)
