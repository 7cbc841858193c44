"""Where a sliding window is shorter than the sequence, a replay sees the keys that the rollout saw, and no others."""

import pytest
import torch
from rollouts import alone, ragged, sample, worst
from tiny import tiny_model
from transformers import ContinuousBatchingConfig, GenerationConfig

THINKING = {"r_min": 0.5, "r_max": 0.9}
WINDOWS = {
    "mistral": {"sliding_window": 6},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0},
}
windows = pytest.mark.parametrize("family", list(WINDOWS))


def both(family):
    """(a model with a window, one with the same weights without)."""
    return [tiny_model(family, thinking=THINKING, **WINDOWS[family] | own) for own in ({}, {"sliding_window": None})]


@windows
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}], ids=str)
def test_a_replay_is_the_rollout_of_every_kind_of_cache_and_would_not_be_without_the_window(
    family, tokenizer, options
):
    model, everything = both(family)
    inputs = ragged(tokenizer)
    out = sample(model, tokenizer, inputs, biased=False, **options)
    assert out.thinking_mask.any(1).all()
    assert worst(model, out, inputs) < 1e-4
    assert worst(everything, out, inputs) > 1e-2


@windows
def test_continuous_batching_thinks_within_the_window_as_generate_does(family, tokenizer):
    model, everything = both(family)
    prompt = tokenizer("What is 3 + 4?")["input_ids"]
    asked = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=tokenizer.pad_token_id)
    config = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=8)  # a prompt in two pieces
    (output,) = model.generate_batch([prompt], asked, config, tokenizer=tokenizer, thinking=True).values()
    tokens, states, _, _ = alone(model, tokenizer, prompt, 12)
    assert output.generated_tokens == tokens != alone(everything, tokenizer, prompt, 12)[0]
    assert torch.allclose(output.thinking_states, states, atol=1e-4)
