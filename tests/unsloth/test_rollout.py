"""On unsloth alone: what the rollout sampled is what the replay scores."""

import pytest
import torch
from rollouts import ragged, sample, worst

from hrpo_patches import replay_forward
from hrpo_thinking.errors import InputError
from hrpo_thinking.inputs import ThinkingInputs


@pytest.fixture
def model(load, family):
    return load(family, torch.float32).eval()


def test_a_replay_gives_the_rollouts_log_probabilities(model, tokenizer):
    inputs = ragged(tokenizer).to(model.device)
    out = sample(model, tokenizer, inputs, max_new_tokens=12, biased=False)
    assert out.thinking_residual == "projection" and out.thinking_mask.float().mean() > 0.5
    assert worst(model, out, inputs) < 1e-4
    shifted = torch.cat([out.thinking_states[:, 1:], out.thinking_states[:, -1:]], 1)
    assert worst(model, out, inputs, states=shifted) > 0.05
    assert worst(model, out, inputs, with_mask=False) > 2e-3


def test_a_rollouts_states_can_be_trained_on_although_unsloth_generates_in_inference_mode(model, tokenizer):
    inputs = ragged(tokenizer, ["Hi"]).to(model.device)
    out = sample(model, tokenizer, inputs, max_new_tokens=4, biased=False)
    model.train()
    logits = model(
        out.sequences.clone(), thinking_inputs=ThinkingInputs(out.thinking_states, out.thinking_mask), use_cache=False
    ).logits
    logits.square().mean().backward()
    assert model.model.thinking_projection.weight.grad.norm() > 0


def test_a_gradient_that_is_given_to_a_state_stays_the_givers(model, tokenizer):
    """Otherwise unsloth's final norm writes the gradient that it passes on over it."""
    model.train()
    inputs = ragged(tokenizer, ["Hi", "Hello"]).to(model.device)
    state = model(**inputs, use_cache=False, output_last_hidden_state=True).last_hidden_state
    given = torch.randn_like(state)
    before = given.clone()
    torch.autograd.backward([state], [given])
    assert torch.equal(given, before) and model.model.norm.weight.grad.norm() > 0


def test_every_way_that_the_forward_ends_hands_the_state_over(model, tokenizer, monkeypatch):
    inputs = ragged(tokenizer, ["Hi"]).to(model.device)
    asked = {"use_cache": False, "output_last_hidden_state": True}
    with torch.no_grad():
        expected = model(**inputs, **asked).last_hidden_state
        assert not hasattr(model(**inputs, use_cache=False), "last_hidden_state")
        fused = model(**inputs, labels=inputs["input_ids"], **asked)
        monkeypatch.setenv("UNSLOTH_RETURN_HIDDEN_STATES", "1")
        headless = model(**inputs, **asked)
    assert torch.equal(fused.last_hidden_state, expected)
    assert torch.equal(headless.last_hidden_state, expected)


def test_an_input_that_unsloth_would_cut_is_refused_when_thinking(load, tokenizer):
    model = load("llama", torch.float32).train()
    model.model.max_seq_length = 4
    ids = torch.zeros(1, 6, dtype=torch.long, device=model.device)
    states, mask = torch.zeros(1, 3, 32, device=model.device), torch.ones(1, 3, dtype=torch.bool, device=model.device)
    with pytest.raises(InputError, match="6 positions.*max_seq_length=4.*max_seq_length=6"):
        model(ids, thinking_inputs=ThinkingInputs(states, mask))


def test_forced_thoughts_begin_every_completion_and_a_gradient_through_them_is_refused(model, tokenizer):
    inputs = ragged(tokenizer).to(model.device)
    out = sample(model, tokenizer, inputs, max_new_tokens=6, biased=False, thoughts=3)
    tokens = out.sequences[:, inputs["input_ids"].shape[1] :]
    assert (tokens[:, :3] == tokenizer.get_vocab()["."]).all() and out.thinking_mask[:, :3].all()
    given = {"thinking_states": out.thinking_states, "thinking_mask": out.thinking_mask}
    for bptt in (2, "exact", "sequential"):
        with pytest.raises(InputError, match="unsloth's backward overwrites"):
            replay_forward(model, out.sequences, bptt=bptt, **given)


def test_no_captured_decode_step_of_unsloths_can_skip_the_blend():
    import inspect

    from unsloth.models import llama

    source = inspect.getsource(llama)
    assert "take_thinking(self.model, kwargs, q_len)" in source
    if "_decode_graphs" in source:  # since 2026.10.9, by default in the rollouts of a trainer on an NVIDIA GPU
        assert source.count("_decode_graphs.decode_step(") == 1
        assert "captured = not output_last_hidden_state and _decode_graphs.enabled()" in source
    else:
        assert not any(word in source.lower() for word in ("cudagraph", "cuda_graph", "graph.replay"))
