"""Rollout and replay give the same log-probabilities, and the test would notice if they did not."""

import pytest
import torch
from rollouts import bias, completions, ragged, real_tokens, sample, worst
from shared_fixtures import every_family
from tiny import tiny_model

from hrpo_patches import replay_forward
from hrpo_thinking.inputs import ThinkingInputs

TOLERANCE = 1e-4
RESIDUALS = ["projection", "embedding"]


def assert_varied(model, tokenizer, out, inputs):
    """Some completions carry the marker and some do not, and they differ in length."""
    tokens = completions(out, inputs)
    real = real_tokens(model, tokens)
    texts = [tokenizer.decode(row[keep]) for row, keep in zip(tokens, real, strict=True)]
    marked = ["####" in text for text in texts]
    assert any(marked) and not all(marked), texts
    assert len(set(real.sum(1).tolist())) > 1, texts
    for row, text_marked in enumerate(marked):
        thinking = out.thinking_mask[row]
        expected = [keep and "####" not in tokenizer.decode(tokens[row, : c + 1]) for c, keep in enumerate(real[row])]
        assert thinking.tolist() == [bool(e) for e in expected], text_marked


def assert_replays(model, out, inputs, sharp, **options):
    assert worst(model, out, inputs, **options) < TOLERANCE
    # Each of these is a bug that published code has had; the tolerance must be tight enough to see it.
    shifted = torch.roll(out.thinking_states, -1, dims=1)
    assert worst(model, out, inputs, states=shifted, **options) > sharp * TOLERANCE
    assert worst(model, out, inputs, states=torch.zeros_like(out.thinking_states), **options) > sharp * TOLERANCE
    assert worst(model, out, inputs, with_mask=False, **options) > sharp * TOLERANCE


@every_family
@pytest.mark.parametrize("residual", RESIDUALS)
def test_replaying_a_tiny_rollout_gives_its_log_probabilities(family, tokenizer, residual):
    model = tiny_model(family, thinking={"residual": residual, "r_min": 0.5, "r_max": 0.9})
    inputs = ragged(tokenizer)
    out = sample(model, tokenizer, inputs, seed=1, num_return_sequences=8)
    assert_varied(model, tokenizer, out, inputs)
    assert out.thinking_residual == residual
    assert_replays(model, out, inputs, sharp=10, biases=bias(tokenizer))


@pytest.mark.smollm2
@pytest.mark.parametrize("residual", RESIDUALS)
def test_replaying_a_real_rollout_gives_its_log_probabilities(smollm2, residual):
    model, tokenizer = smollm2
    shots = "Calculate 8 + 6.\n8 + 6 = 14 #### 14\n\nCalculate 28 + 16.\n28 + 16 = 44 #### 44\n\n"
    inputs = ragged(tokenizer, [f"{shots}Calculate 9 + 5.\n", "Write #### after one word:", "Hello"])
    model.config.thinking["residual"] = residual
    try:
        out = sample(model, tokenizer, inputs, biased=False, num_return_sequences=2, eos_token_id=[2, 198])
        model.config.eos_token_id = [2, 198]
        assert_varied(model, tokenizer, out, inputs)
        assert_replays(model, out, inputs, sharp=5)
    finally:
        model.config.thinking["residual"], model.config.eos_token_id = "projection", 2


@pytest.mark.parametrize("width", [3, 5, 8])
def test_a_rollout_is_cut_or_padded_to_the_width_of_the_batch(width):
    rollout = ThinkingInputs(torch.randn(2, 5, 4), torch.ones(2, 5, dtype=torch.bool), "projection")
    aligned = rollout.aligned(width)
    assert aligned.states.shape == (2, width, 4) and aligned.mask.shape == (2, width)
    kept = min(width, 5)
    assert torch.equal(aligned.states[:, :kept], rollout.states[:, :kept]) and aligned.mask[:, :kept].all()
    assert not aligned.mask[:, kept:].any()


def test_the_gradient_of_a_replay_reaches_the_weights_and_not_the_states(family, tokenizer):
    model = tiny_model(family)
    inputs = ragged(tokenizer)
    out = sample(model, tokenizer, inputs)
    rollout = ThinkingInputs(out.thinking_states.clone().requires_grad_(), out.thinking_mask, "projection")
    given = {"thinking_states": rollout.states, "thinking_mask": rollout.mask}
    replay_forward(model, out.sequences, **given).logits.logsumexp(-1).sum().backward()
    assert rollout.states.grad is None
    assert model.model.thinking_projection.weight.grad.norm() > 0
