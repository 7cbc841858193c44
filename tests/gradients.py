"""Oracles of the gradient through thoughts, with the formulas written out; shared by several tests."""

import torch
from peft import LoraConfig, get_peft_model
from rollouts import TEMPERATURE, completions, ragged, sample
from tiny import FAMILIES, byte_tokenizer, tiny_model

from hrpo_patches import replay_forward, thinking_roll
from hrpo_thinking.parts import parts_of

FELT = {"r_min": 0.3, "r_max": 0.6}  # a start in which thoughts matter


def compute_norms_in_float64(monkeypatch):
    """Stock's norms compute in float32, too coarse for these tests."""

    def norm(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    for family in FAMILIES:
        monkeypatch.setattr(type(tiny_model(family).model.norm), "forward", norm)


def thinking_model(family, residual="projection", lora=False, **options):
    """A tiny model in float64 that trains everything, or LoRA and the thinking modules."""
    model = tiny_model(family, thinking={"residual": residual} | FELT, **options)
    if lora:
        adapter = LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        adapter.modules_to_save = parts_of(residual)
        model = get_peft_model(model, adapter, autocast_adapter_dtype=False)
    return model.double().train()


def rollout_of(model):
    """Tokens, attention mask, states and thinking mask of a ragged batch; the marker comes early, late and never.

    The tokens are sampled with a bias, so that the states are those of a roll of the tokens.
    """
    inputs = ragged(byte_tokenizer())
    model.eval()
    for seed in range(50):
        out = sample(model, byte_tokenizer(), inputs, seed=seed, num_return_sequences=2, max_new_tokens=7)
        counts = out.thinking_mask.sum(1).tolist()
        if max(counts) == 7 and min(counts) <= 1 and any(1 < count < 7 for count in counts):
            break
    else:
        raise AssertionError("no seed gives markers early, late and never")
    model.train()
    prompts = inputs["attention_mask"].repeat_interleave(2, 0)
    attention = torch.cat([prompts, torch.ones_like(completions(out, inputs))], 1)
    assert (attention == 0).any(1).sum() > 1
    states = thinking_roll(model, out.sequences, attention, out.thinking_mask, TEMPERATURE)
    return out.sequences, attention, states, out.thinking_mask


def log_probability(logits, tokens, width):
    logps = logits[:, -width - 1 : -1].log_softmax(-1)
    return logps.gather(-1, tokens[:, -width:, None]).sum()


def replayed(model, rollout, bptt, with_mask=True, **options):
    """The completions' log-probability by one replay; exact to 1e-8."""
    tokens, attention, states, mask = rollout
    out = replay_forward(
        model,
        tokens,
        attention if with_mask else None,
        thinking_states=states,
        thinking_mask=mask,
        bptt=bptt,
        bptt_tolerance=1e-8,
        temperature=TEMPERATURE,
        **options,
    )
    return log_probability(out.logits, tokens, mask.shape[1])


def think(causal, state, e, mask, constant=False):
    """The input (B, d) of a position of embedding e that thinks where its mask (B,) says so, after a state (B, d)."""
    backbone = causal.model
    gate_r, gate_i = backbone.thinking_residual_gate_r, backbone.thinking_residual_gate_i
    Lambda = next(p for n, p in backbone.named_parameters() if n.endswith("Lambda") and p.requires_grad)
    if causal.config.thinking["residual"] == "projection":
        projected = backbone.thinking_projection(state)
        s = projected / (projected.square().sum(-1, keepdim=True).sqrt() + 1e-8)
    else:
        p = (causal.lm_head(state) / TEMPERATURE).softmax(-1)
        s = (p @ backbone.embed_tokens.weight) / p.square().sum(-1, keepdim=True).sqrt()
        s = s.detach() if constant else s  # a finished residual is stored
    a = torch.exp(-8 * torch.nn.functional.softplus(-Lambda) * torch.sigmoid(gate_r(e)))
    blended = a * e + torch.sqrt(1 - a**2 + 1e-8) * torch.sigmoid(gate_i(e)) * s
    return torch.where(mask[:, None], blended, e)


def decoded(model, rollout, depth=None):
    """The completions' log-probability, decoding one by one with the states in the graph: no cache, no adjoint.

    With a `depth` the gradient is truncated: states are constants first, and `depth` times those of a forward whose
    inputs are made from the states of before. All have the same values.
    """
    tokens, attention, _, mask = rollout
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    width = mask.shape[1]
    columns = range(tokens.shape[1] - width, tokens.shape[1])
    embeds = causal.model.embed_tokens(tokens).unbind(1)

    def states_of(inputs):
        inputs = torch.stack(inputs, 1)
        return causal.model(inputs_embeds=inputs, attention_mask=attention[:, : inputs.shape[1]]).last_hidden_state

    states, inputs = [], list(embeds)
    with torch.set_grad_enabled(depth is None):
        for column, t in enumerate(columns):
            states.append(states_of(inputs[:t])[:, -1])
            inputs[t] = think(causal, states[-1], inputs[t], mask[:, column])
    for level in range(depth + 1 if depth is not None else 0):
        thought = [think(causal, states[c], embeds[t], mask[:, c], not level) for c, t in enumerate(columns)]
        inputs = [*embeds[: columns[0]], *thought]
        states = states_of(inputs)[:, columns[0] - 1 : -1].unbind(1)
    logits = causal(inputs_embeds=torch.stack(inputs, 1), attention_mask=attention).logits
    return log_probability(logits, tokens, width)


def gradients(model, value):
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def difference(found, expected):
    """The largest relative difference of any parameter's gradient."""
    assert found.keys() == expected.keys()
    return max(((found[n] - g).norm() / g.norm()).item() for n, g in expected.items() if g.norm() > 0)
