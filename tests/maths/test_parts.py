"""The two tables: what trains what, and a residual of one's own, registered from here."""

import pytest
import torch
from gradients import difference, gradients
from rollouts import ragged, sample
from runs import small_trainer
from tiny import tiny_model

from hrpo_patches import ThinkingConfig, load_adapter, replay_forward, thinking_roll
from hrpo_thinking.errors import InputError
from hrpo_thinking.parts import MODULES, PARTS, RESIDUALS, ResidualKind, parts_of, register, residual_of


@pytest.fixture
def bare_state():
    """A residual that is the last hidden state itself, normalised."""
    kind = ResidualKind(
        "bare_state",
        needs_state=True,
        observe=lambda hidden, scores, embeddings: hidden.clone(),
        make=lambda backbone, states: torch.nn.functional.normalize(states.float(), dim=-1),
    )
    register(kind)
    yield kind
    del RESIDUALS[kind.name]


def test_every_residual_trains_the_gates_and_one_the_projection():
    assert parts_of("projection") == list(MODULES)
    assert parts_of("embedding") == [name for name in MODULES if name != "thinking_projection"]
    assert parts_of(None) == []


def test_none_is_spelled_in_one_way_inside():
    assert residual_of("none") is None and residual_of(None) is None and residual_of("embedding") == "embedding"
    with pytest.raises(InputError, match="one of \\('projection', 'embedding', 'none'\\), not 'both'"):
        residual_of("both")


def test_a_name_is_taken_once(bare_state):
    for taken in (bare_state, bare_state._replace(name="none")):
        with pytest.raises(InputError, match="already"):
            register(taken)


@pytest.mark.parametrize("bptt", [0, "exact"])
def test_a_residual_of_ones_own_is_rolled_out_replayed_trained_and_reloaded(tmp_path, family, bare_state, bptt):
    trainer = small_trainer(tmp_path / "run", family, residual="bare_state", bptt=bptt)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    moved = {name for name, value in before.items() if not torch.equal(value, trainer.model.get_parameter(name))}
    for name in parts_of("bare_state"):
        assert any(f".{name}." in parameter for parameter in moved), name
    assert not any("thinking_projection" in name for name in before)
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = load_adapter(tiny_model(family, thinking=None), tmp_path / "adapter")
    assert ThinkingConfig.of(loaded.config).residual == "bare_state"
    for name in before:
        assert torch.equal(loaded.get_parameter(name), trainer.model.get_parameter(name)), name


@pytest.fixture
def halved():
    """A residual that is half of the projected one, and trains the projection."""
    kind = ResidualKind(
        "halved",
        needs_state=True,
        observe=lambda hidden, scores, embeddings: hidden.clone(),
        make=lambda backbone, states: 0.5 * backbone.projected_residual(states),
    )
    register(kind, trains=["thinking_projection"])
    yield kind
    del RESIDUALS[kind.name]
    PARTS[0].residuals.discard(kind.name)


def test_a_residual_of_ones_own_may_train_the_projection(tmp_path, halved):
    assert parts_of("halved") == list(MODULES)
    trainer = small_trainer(tmp_path / "run", residual="halved")
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = load_adapter(tiny_model("llama", thinking=None), tmp_path / "adapter")
    (name,) = [name for name in before if "thinking_projection" in name]
    assert not torch.equal(before[name], trainer.model.get_parameter(name))
    assert torch.equal(loaded.get_parameter(name), trainer.model.get_parameter(name))


def test_a_module_that_is_not_there_cannot_be_trained(bare_state):
    with pytest.raises(InputError, match="unknown thinking module 'thinking_gate'"):
        register(bare_state._replace(name="other"), trains=["thinking_gate"])
    assert "other" not in RESIDUALS


def test_an_adapter_with_a_residual_that_nobody_registered_says_so(tmp_path, bare_state):
    trainer = small_trainer(tmp_path / "run", residual="bare_state")
    trainer.save_model(str(tmp_path / "adapter"))
    row = RESIDUALS.pop("bare_state")
    try:
        with pytest.raises(InputError, match="asks for what is not there: residual must be one of"):
            load_adapter(tiny_model("llama", thinking=None), tmp_path / "adapter")
    finally:
        RESIDUALS["bare_state"] = row


def test_a_residual_that_keeps_something_else_of_a_state_is_decoded_and_credited_as_it_was_rolled_out(tokenizer):
    register(ResidualKind("half", True, lambda h, scores, table: 0.5 * h, lambda backbone, kept: kept))
    try:
        model = tiny_model("llama", thinking={"residual": "half", "r_min": 0.5, "r_max": 0.9})
        inputs = ragged(tokenizer)
        out = sample(model, tokenizer, inputs, biased=False, max_new_tokens=6)
        given = {"thinking_states": out.thinking_states, "thinking_mask": out.thinking_mask}
        states = thinking_roll(model, out.sequences, out.attention_mask, out.thinking_mask)
        assert (states - out.thinking_states)[out.thinking_mask].abs().max() < 1e-3
        found = [
            gradients(model, replay_forward(model, out.sequences, out.attention_mask, bptt=bptt, **given).logits.sum())
            for bptt in ("exact", "sequential")
        ]
    finally:
        del RESIDUALS["half"]
    assert difference(*found) < 1e-2  # in float32
