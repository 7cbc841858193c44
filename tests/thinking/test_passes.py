"""The gradient through the thoughts is that of decoding them one by one, and the tests would notice if it were not."""

import pytest
import torch
from peft import LoKrConfig, LoraConfig, get_peft_model
from rollouts import TEMPERATURE, completions, ragged, sample, sampled_logps
from tiny import FAMILIES, byte_tokenizer, tiny_model
from transformers import DynamicCache

from hrpo_patches import replay_forward, thinking_roll
from hrpo_patches.thinking import passes
from hrpo_patches.thinking.controls import controlled
from hrpo_patches.thinking.passes import STRETCH
from hrpo_thinking.errors import InputError
from hrpo_thinking.parts import parts_of

RESIDUALS = ["projection", "embedding"]
FELT = {"r_min": 0.3, "r_max": 0.6}  # a start in which thoughts matter


@pytest.fixture(params=RESIDUALS)
def residual(request):
    return request.param


def thinking_model(family, residual="projection", lora=False, **options):
    """A tiny model in float64 that trains everything, or LoRA and the thinking modules."""
    model = tiny_model(family, thinking={"residual": residual} | FELT, **options)
    if lora:
        adapter = LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        adapter.modules_to_save = parts_of(residual)
        model = get_peft_model(model, adapter, autocast_adapter_dtype=False)
    return model.double().train()


def rollout_of(model):
    """Tokens, attention mask, states and thinking mask of a ragged batch; the marker comes early, late and never."""
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
    return out.sequences, attention, out.thinking_states, out.thinking_mask


def log_probability(logits, tokens, width):
    logps = logits[:, -width - 1 : -1].log_softmax(-1)
    return logps.gather(-1, tokens[:, -width:, None]).sum()


def replayed(model, rollout, k, with_mask=True):
    """The completions' log-probability by `k` passes."""
    tokens, attention, states, mask = rollout
    out = replay_forward(
        model,
        tokens,
        attention if with_mask else None,
        thinking_states=states,
        thinking_mask=mask,
        passes=k,
        temperature=TEMPERATURE,
    )
    return log_probability(out.logits, tokens, mask.shape[1])


def decoded(model, rollout):
    """The same, decoding one by one with the states in the graph: no cache, no passes, the formulas written out."""
    tokens, attention, _, mask = rollout
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    backbone, width = causal.model, mask.shape[1]
    start = tokens.shape[1] - width
    inputs = list(backbone.embed_tokens(tokens).unbind(1))
    gate_r, gate_i = backbone.thinking_residual_gate_r, backbone.thinking_residual_gate_i
    Lambda = next(p for n, p in backbone.named_parameters() if n.endswith("Lambda") and p.requires_grad)
    for position in range(start, tokens.shape[1]):
        hidden = backbone(inputs_embeds=torch.stack(inputs[:position], 1), attention_mask=attention[:, :position])
        state = hidden.last_hidden_state[:, -1]
        if causal.config.thinking["residual"] == "projection":
            projected = backbone.thinking_projection(state)
            s = projected / (projected.square().sum(-1, keepdim=True).sqrt() + 1e-8)
        else:
            p = (causal.lm_head(state) / TEMPERATURE).softmax(-1)
            s = (p @ backbone.embed_tokens.weight) / p.square().sum(-1, keepdim=True).sqrt()
        e = inputs[position]
        a = torch.exp(-8 * torch.nn.functional.softplus(-Lambda) * torch.sigmoid(gate_r(e)))
        blended = a * e + torch.sqrt(1 - a**2 + 1e-8) * torch.sigmoid(gate_i(e)) * s
        inputs[position] = torch.where(mask[:, position - start, None], blended, e)
    out = causal(inputs_embeds=torch.stack(inputs, 1), attention_mask=attention)
    return log_probability(out.logits, tokens, width)


def gradients(model, value):
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def difference(found, expected):
    """The largest relative difference of any parameter's gradient."""
    assert found.keys() == expected.keys()
    return max(((found[n] - g).norm() / g.norm()).item() for n, g in expected.items() if g.norm() > 0)


@pytest.fixture
def float64_everywhere(monkeypatch):
    """The norms compute in float32, too coarse for these tests."""

    def norm(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    for family in FAMILIES:
        monkeypatch.setattr(type(tiny_model(family).model.norm), "forward", norm)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_all_and_as_many_passes_as_thoughts_have_the_gradient_of_decoding_one_by_one(
    family, residual, lora, float64_everywhere
):
    model = thinking_model(family, residual, lora)
    rollout = rollout_of(model)
    expected = gradients(model, decoded(model, rollout))
    parts = ["gate_r", "gate_i", "Lambda", "lora_A" if lora else "q_proj", "lora_B" if lora else "embed_tokens"]
    parts += ["thinking_projection"] if residual == "projection" else []
    for part in parts:
        assert any(part in name and gradient.norm() > 0 for name, gradient in expected.items()), part
    for k in ("all", 8, 9):
        assert difference(gradients(model, replayed(model, rollout, k)), expected) < 1e-5, k
    assert difference(gradients(model, replayed(model, rollout, 4)), expected) > 1e-4
    assert difference(gradients(model, replayed(model, rollout, 1)), expected) > 0.1


def test_one_pass_is_the_models_own_forward_to_the_last_bit(family, residual):
    model = thinking_model(family, residual)
    tokens, attention, states, mask = rollout = rollout_of(model)
    own = model(tokens, attention_mask=attention, thinking_states=states, thinking_mask=mask)
    expected = gradients(model, log_probability(own.logits, tokens, mask.shape[1]))
    found = gradients(model, replayed(model, rollout, 1))
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize("part", ["thinking_projection.weight", "Lambda", "gate_r.bias", "gate_i.weight", "q_proj"])
def test_the_gradient_is_that_of_finite_differences_with_thoughts_that_follow_the_weights(
    family, part, float64_everywhere
):
    model = thinking_model(family)
    rollout = rollout_of(model)
    gradient = gradients(model, replayed(model, rollout, "all"))
    name, parameter = next((n, p) for n, p in model.named_parameters() if part in n)
    torch.manual_seed(0)
    direction = torch.randn_like(parameter)
    step = 1e-6 * max(parameter.norm().item(), 0.1) / direction.norm().item()

    def moved(sign):
        with torch.no_grad():
            parameter.add_(sign * step * direction)
            value = replayed(model, rollout, "all").item()
            parameter.sub_(sign * step * direction)
        return value

    measured = (moved(1) - moved(-1)) / (2 * step)
    assert measured == pytest.approx((gradient[name] * direction).sum().item(), rel=1e-4)


def plant(monkeypatch, fault):
    """Make the states that residuals are made from those of one position later or earlier, or constants."""
    live, advance, seen = passes.live_states, passes._think_and_advance, {}

    def faulty_pass(hidden, width, head):
        return live(hidden, width, head).detach() if fault == "detached" else hidden[:, -width:]

    def faulty_step(backbone, thinks, state, inputs, attention, positions, past):
        position = int(positions[0, 0])
        seen[position] = state
        state = state.detach() if fault == "detached" else seen.get(position - 1, state)
        return advance(backbone, thinks, state, inputs, attention, positions, past)

    monkeypatch.setattr(passes, "live_states", faulty_pass)
    monkeypatch.setattr(passes, "_think_and_advance", faulty_step)


@pytest.mark.parametrize("k", ["all", 8])
@pytest.mark.parametrize("fault", ["shifted", "detached", "no mask"])
def test_a_shift_a_detached_state_and_a_missing_mask_are_seen(family, k, fault, monkeypatch, float64_everywhere):
    model = thinking_model(family)
    rollout = rollout_of(model)
    expected = gradients(model, decoded(model, rollout))
    if fault != "no mask":
        plant(monkeypatch, fault)
    found = gradients(model, replayed(model, rollout, k, with_mask=fault != "no mask"))
    assert difference(found, expected) > 1e-2


@pytest.mark.parametrize("k", [3, "all"])
def test_gradient_checkpointing_changes_nothing(family, residual, k):
    model = thinking_model(family, residual)
    rollout = rollout_of(model)
    expected = gradients(model, replayed(model, rollout, k))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert difference(gradients(model, replayed(model, rollout, k)), expected) < 1e-9
    assert all(layer.gradient_checkpointing for layer in model.model.layers)


@pytest.mark.parametrize("k", [3, "all"])
def test_data_parallel_training_sees_one_forward(family, k, tmp_path):
    model = thinking_model(family)
    rollout = rollout_of(model)
    expected = gradients(model, replayed(model, rollout, k))
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)  # every weight is used, once
        found = gradients(wrapped, replayed(wrapped, rollout, k))
        nobody = (*rollout[:3], torch.zeros_like(rollout[3]))
        for _ in range(2):  # also where nobody thinks, or the second forward would wait for gradients of the first
            replayed(wrapped, nobody, k).backward()
        del wrapped  # before its process group: whose last owner it would be, and may then wait for the group for ever
    finally:
        torch.distributed.destroy_process_group()
    assert difference({name.removeprefix("module."): g for name, g in found.items()}, expected) < 1e-9


def test_thoughts_with_gaps_and_long_stretches_without_any_are_exact(family, monkeypatch):
    monkeypatch.setattr(passes, "STRETCH", 3)
    model = thinking_model(family)
    tokens, attention, states, mask = rollout_of(model)
    mask = mask.clone()
    mask[:, 2], mask[:, 5:] = False, False  # and five plain columns behind the last thought
    rollout = (tokens, attention, states, mask)
    expected = gradients(model, decoded(model, rollout))
    assert difference(gradients(model, replayed(model, rollout, "all")), expected) < 1e-5
    nothing = (tokens, attention, states, torch.zeros_like(mask))
    assert replayed(model, nothing, "all").item() == pytest.approx(replayed(model, nothing, 1).item(), abs=1e-6)
    assert STRETCH > 64


def test_dropout_of_other_adapters_is_refused_too():
    model = tiny_model("llama", thinking=FELT)
    kind = {"target_modules": ["q_proj"], "rank_dropout": 0.5, "module_dropout": 0.5}
    model = get_peft_model(model, LoKrConfig(r=4, init_weights=False, **kind)).double().train()
    with pytest.raises(InputError, match="(rank|module)_dropout is 0.5"):
        replayed(model, rollout_of(model), 2)


@pytest.mark.parametrize("k", [8, "all"])
def test_given_positions_are_those_of_every_pass(family, k):
    model = thinking_model(family)
    tokens, attention, states, mask = rollout_of(model)
    given = {"thinking_states": states, "thinking_mask": mask}
    positions = torch.arange(tokens.shape[1]).expand_as(tokens) * 3  # which are not those that a pass would take
    ours = replay_forward(model, tokens, attention, passes=k, position_ids=positions, **given).logits
    plain = replay_forward(model, tokens, attention, passes=k, **given).logits
    first = replay_forward(model, tokens, attention, position_ids=positions, **given).logits
    states = thinking_roll_with(model, tokens, attention, mask, positions)
    again = replay_forward(
        model, tokens, attention, position_ids=positions, thinking_states=states, thinking_mask=mask
    ).logits
    assert (ours - plain).abs().max() > 1e-2 < (ours - first).abs().max()
    assert (ours - again).abs().max() < 1e-4


def thinking_roll_with(model, tokens, attention, mask, positions):
    """States of a roll, by hand: each column's state from a forward over what comes before it."""
    width = mask.shape[1]
    states = torch.zeros(*mask.shape, 32).double()
    with torch.no_grad():
        for column in range(width):
            out = model(
                tokens,
                attention,
                position_ids=positions,
                thinking_states=states,
                thinking_mask=mask,
                output_last_hidden_state=True,
            )
            states[:, column] = out.last_hidden_state[:, -width - 1 + column]
    return states


def test_many_thoughts_are_recomputed_to_the_same_gradient_under_the_control_of_their_forward(family, monkeypatch):
    model = thinking_model(family)
    rollout = rollout_of(model)
    expected = gradients(model, replayed(model, rollout, "all"))
    with controlled(model, "token"):
        under_control = gradients(model, replayed(model, rollout, "all"))
    monkeypatch.setattr(passes, "KEPT", 3)
    assert difference(gradients(model, replayed(model, rollout, "all")), expected) < 1e-9
    with controlled(model, "token"):
        value = replayed(model, rollout, "all")
    found = gradients(model, value)  # the control is gone when the backward recomputes
    compared = {name: g for name, g in found.items() if under_control[name].norm() > 0}
    assert difference(compared, {name: under_control[name] for name in compared}) < 1e-9


def test_the_embedding_residuals_logits_are_made_in_chunks(family, monkeypatch):
    model = thinking_model(family, "embedding")
    rollout = rollout_of(model)
    expected = gradients(model, replayed(model, rollout, 3))
    monkeypatch.setattr(passes, "_LOGITS", 2 * 8 * model.config.vocab_size)  # two columns of eight rows
    assert difference(gradients(model, replayed(model, rollout, 3)), expected) < 1e-9


def test_a_sliding_window_slides_in_every_pass():
    model = thinking_model("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=0)
    rollout = rollout_of(model)
    expected = gradients(model, decoded(model, rollout))
    for k in ("all", 8):
        assert difference(gradients(model, replayed(model, rollout, k)), expected) < 1e-5


def test_a_roll_of_given_tokens_has_the_states_of_the_rollout_that_sampled_them(family, residual, tokenizer):
    model = tiny_model(family, thinking={"residual": residual, "r_min": 0.8, "r_max": 0.95})
    inputs = ragged(tokenizer)
    out = sample(model, tokenizer, inputs, biased=False, max_new_tokens=8)  # rounding is fed back, and grows
    attention = torch.cat([inputs["attention_mask"], torch.ones_like(completions(out, inputs))], 1)
    states = thinking_roll(model, out.sequences, attention, out.thinking_mask, TEMPERATURE)
    assert (states - out.thinking_states)[out.thinking_mask].abs().max() < 1e-3
    for k in (1, 2, "all"):  # on policy, each has the rollout's values
        logits = replay_forward(
            model,
            out.sequences,
            attention,
            thinking_states=out.thinking_states,
            thinking_mask=out.thinking_mask,
            passes=k,
            temperature=TEMPERATURE,
        ).logits[:, inputs["input_ids"].shape[1] - 1 : -1]
        logps = (logits / TEMPERATURE).log_softmax(-1).gather(-1, completions(out, inputs)[..., None])[..., 0]
        assert (logps - sampled_logps(out, inputs))[out.thinking_mask].abs().max() < 1e-4, k


def test_off_policy_all_has_todays_values_and_one_pass_the_rollouts(family, float64_everywhere):
    model = thinking_model(family)
    rollout = rollout_of(model)
    with torch.no_grad():
        model.model.thinking_projection.weight.add_(torch.randn(32, 32).double())
        exact = decoded(model, rollout).item()
        assert replayed(model, rollout, "all").item() == pytest.approx(exact, rel=1e-9)
        assert replayed(model, rollout, 8).item() == pytest.approx(exact, rel=1e-9)
        assert abs(replayed(model, rollout, 1).item() - exact) > 1e-3 * abs(exact)


@pytest.mark.parametrize("k", [0, -1, 1.5, True, "most", None])
def test_passes_that_cannot_be_are_refused(family, k):
    model = thinking_model(family)
    with pytest.raises(InputError, match="whole number from 1, or 'all'"):
        replayed(model, rollout_of(model), k)


@pytest.mark.parametrize("k", [2, "all"])
def test_dropout_is_refused_where_it_would_be_drawn_anew_in_each_pass(k):
    attention = thinking_model("llama", attention_dropout=0.1)
    projection = thinking_model("llama")
    projection.config.thinking["projection_dropout"] = 0.2
    lora = thinking_model("llama", lora=True)
    lora.base_model.model.model.layers[0].self_attn.q_proj.lora_dropout["default"] = torch.nn.Dropout(0.3)
    for model, name in ((attention, "attention_dropout"), (projection, "projection_dropout"), (lora, "lora_dropout")):
        rollout = rollout_of(model)
        with pytest.raises(InputError, match=f"{name}.* is 0.[123]"):
            replayed(model, rollout, k)
        with torch.no_grad(), pytest.raises(InputError, match=name):
            replayed(model, rollout, k)
        assert replayed(model.eval(), rollout, k).isfinite()
        model.eval()
        (model.get_base_model() if hasattr(model, "get_base_model") else model).model.layers.train()
        if name != "projection_dropout":
            with pytest.raises(InputError, match=name):
                replayed(model, rollout, k)


@pytest.mark.parametrize("k", [2, "all"])
def test_what_several_passes_cannot_do_is_refused(family, k):
    model = thinking_model(family)
    tokens, attention, states, mask = rollout_of(model)
    whole = {"thinking_states": torch.zeros(*tokens.shape, 32).double(), "thinking_mask": torch.ones_like(tokens) > 0}
    with pytest.raises(InputError, match="K < L"):
        replay_forward(model, tokens, attention, passes=k, **whole)
    given = {"thinking_states": states, "thinking_mask": mask}
    with pytest.raises(InputError, match=r"attention_mask \(B, L\)"):
        replay_forward(model, tokens, attention[:, None, None] > 0, passes=k, **given)
    with pytest.raises(InputError, match="replay_forward"):
        model(tokens, thinking_passes=k, thinking_residual="embedding", **given)
    with pytest.raises(InputError, match=r"attention_mask \(B, L\)"):
        replay_forward(model, tokens, torch.cat([attention, attention], 1), passes=k, **given)
    with pytest.raises(InputError, match="leave past_key_values out"):
        replay_forward(model, tokens, attention, passes=k, past_key_values=DynamicCache(), **given)
    with pytest.raises(InputError, match="has to be bool"):
        replay_forward(model, tokens, attention, passes=k, **given | {"thinking_mask": mask.long()})
    if k == "all":
        for name in ("output_hidden_states", "output_attentions"):
            with pytest.raises(InputError, match=name):
                model(tokens, thinking_passes="all", thinking_mask=mask, **{name: True})
    else:
        with pytest.raises(InputError, match="one of them is missing"):
            replay_forward(model, tokens, attention, passes=k, thinking_mask=mask)
