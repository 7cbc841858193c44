"""Makes rollouts of which some answer and some do not, and replays them; shared by several tests."""

import torch

from hrpo_thinking.inputs import ThinkingInputs

LENGTH, TEMPERATURE = 24, 0.7


def ragged(tokenizer, prompts=("Hi", "What is 3 + 4?", "Say #### once, or ##", "abc")):
    return tokenizer(list(prompts), return_tensors="pt", padding=True)


def bias(tokenizer):
    """Makes a random model answer and end often enough for a small batch to hold every kind of completion."""
    wanted = ["####", "##", tokenizer.eos_token]
    return {i: 4.0 for i in tokenizer.convert_tokens_to_ids(wanted) if i is not None}


def sample(model, tokenizer, inputs, seed=0, biased=True, **options):
    """A sampled thinking rollout with the scores that every token was drawn from."""
    torch.manual_seed(seed)
    arguments = {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0, "max_new_tokens": LENGTH} | options
    if biased:
        arguments["sequence_bias"] = {(i,): value for i, value in bias(tokenizer).items()}
    return model.generate(
        **inputs, tokenizer=tokenizer, thinking=True, return_dict_in_generate=True, output_scores=True, **arguments
    )


def alone(model, tokenizer, prompt, new, **more):
    """(tokens, states, mask, ratio) of one prompt by `generate`, greedy, to `new` tokens; of a plain one, tokens."""
    inputs = torch.tensor([prompt])
    out = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        tokenizer=tokenizer,
        return_dict_in_generate=True,
        eos_token_id=None,
        **{"max_new_tokens": new, "do_sample": False, "pad_token_id": tokenizer.pad_token_id, "thinking": True} | more,
    )
    tokens = out.sequences[0, len(prompt) :].tolist()
    if out.get("thinking_states") is None:
        return (tokens,)
    return tokens, out.thinking_states[0], out.thinking_mask[0], out.thinking_ratio[0]


def assert_same_distribution(one, other):
    """A chi-square of two samples of one size, each a `Counter`: fails for about 1 in 1,000 of those that are."""
    common = [token for token in one | other if one[token] + other[token] >= 20]
    free = len(common) - 1
    squares = sum((one[token] - other[token]) ** 2 / (one[token] + other[token]) for token in common)
    assert free > 2 and squares < free + 4 * (2 * free) ** 0.5, (free, squares)


def completions(out, inputs):
    return out.sequences[:, inputs["input_ids"].shape[1] :]


def real_tokens(model, tokens):
    """(B, C) bool: completion tokens up to and including the first end token."""
    ends = model.config.eos_token_id
    ended = torch.isin(tokens, torch.tensor(ends, device=tokens.device)).long()
    return ended.cumsum(1) - ended == 0


def sampled_logps(out, inputs):
    """(B, C): log-probabilities computed step by step in the rollout."""
    return torch.stack(out.scores, 1).log_softmax(-1).gather(-1, completions(out, inputs)[..., None])[..., 0]


@torch.no_grad()
def replayed_logps(model, out, inputs, states=None, with_mask=True, biases=None):
    """(B, C): log-probabilities of one parallel forward over the recorded states; `biases` are the rollout's."""
    tokens = completions(out, inputs)
    mask = inputs["attention_mask"].repeat_interleave(len(tokens) // len(inputs["attention_mask"]), 0)
    mask = torch.cat([mask, torch.ones_like(tokens)], 1)
    logits = model(
        out.sequences,
        attention_mask=mask if with_mask else None,
        thinking_inputs=ThinkingInputs(
            out.thinking_states if states is None else states, out.thinking_mask, out.thinking_residual
        ),
    ).logits
    logits = logits[:, inputs["input_ids"].shape[1] - 1 : -1]
    for i, value in (biases or {}).items():
        logits[..., i] += value
    logits = logits / TEMPERATURE
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def worst(model, out, inputs, **options):
    """The largest difference between rollout and replay over all real completion tokens."""
    difference = (replayed_logps(model, out, inputs, **options) - sampled_logps(out, inputs)).abs()
    return difference[real_tokens(model, completions(out, inputs))].max().item()
