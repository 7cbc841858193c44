"""The adjoint's gradient through the thoughts is that of decoding them one by one, in every way of training."""

import gradients as oracle
import pytest
import torch
from gradients import FELT, decoded, difference, gradients, log_probability, replayed, rollout_of, thinking_model
from peft import LoraConfig, get_peft_model
from rollouts import TEMPERATURE, completions, ragged, sample, sampled_logps
from shared_fixtures import every_family
from tiny import tiny_model
from torch.nn import Dropout
from transformers import DynamicCache

from hrpo_patches import replay_forward, thinking_roll
from hrpo_patches.thinking import adjoint
from hrpo_patches.thinking.controls import controlled
from hrpo_thinking.errors import InputError

EXACT = 1e-6


@pytest.fixture
def family():
    """One is enough where nothing of a family's own code is asked about; where it is, a test names them all."""
    return "llama"


@pytest.fixture(params=["projection", "embedding"])
def residual(request):
    return request.param


@pytest.fixture
def float64_everywhere(monkeypatch):
    oracle.compute_norms_in_float64(monkeypatch)


@pytest.mark.parametrize(
    ("family", "residual", "lora"),
    [
        ("llama", "projection", False),
        ("llama", "embedding", True),
        ("qwen2", "projection", True),
        ("qwen2", "embedding", False),
        ("qwen3", "projection", False),
        ("qwen3", "embedding", True),
        ("mistral", "projection", True),
    ],
)
def test_exact_and_sequential_are_decoding_one_by_one(family, residual, lora, float64_everywhere):
    model = thinking_model(family, residual, lora)
    rollout = rollout_of(model)
    expected = gradients(model, decoded(model, rollout))
    parts = ["gate_r", "gate_i", "Lambda", "lora_A" if lora else "q_proj", "lora_B" if lora else "embed_tokens"]
    parts += ["thinking_projection"] if residual == "projection" else []
    for part in parts:
        assert any(part in name and gradient.norm() > 0 for name, gradient in expected.items()), part
    for bptt in ("exact", "sequential", 7, 99):
        assert difference(gradients(model, replayed(model, rollout, bptt)), expected) < EXACT, bptt
    assert difference(gradients(model, replayed(model, rollout, 5)), expected) > 1e-5
    assert difference(gradients(model, replayed(model, rollout, 0)), expected) > 0.1


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_k_is_truncated_after_k_thoughts(family, residual, depth, float64_everywhere):
    model = thinking_model(family, residual)
    rollout = rollout_of(model)
    expected = gradients(model, decoded(model, rollout, depth))
    assert difference(gradients(model, replayed(model, rollout, depth)), expected) < EXACT
    for other in (depth - 1, depth + 1):
        assert difference(gradients(model, replayed(model, rollout, other)), expected) > 1e-4


def test_zero_is_the_published_gradient_to_the_last_bit(family, residual, float64_everywhere):
    model = thinking_model(family, residual)
    rollout = rollout_of(model)
    published = gradients(model, replayed(model, rollout, 0))
    assert difference(published, gradients(model, decoded(model, rollout, 0))) < EXACT
    tokens, attention, states, mask = rollout
    live = (tokens, attention, states.clone().requires_grad_(), mask)  # the default, and with no state in a graph
    out = replay_forward(model, tokens, attention, thinking_states=states.clone(), thinking_mask=mask)
    again = gradients(model, log_probability(out.logits, tokens, mask.shape[1]))
    assert all(torch.equal(again[name], gradient) for name, gradient in published.items())
    gradients(model, replayed(model, live, "exact"))
    assert live[2].grad is None


@pytest.mark.parametrize("part", ["thinking_projection.weight", "Lambda", "gate_r.bias", "gate_i.weight", "q_proj"])
def test_the_gradient_is_that_of_finite_differences_with_thoughts_that_follow_the_weights(
    family, part, float64_everywhere
):
    model = thinking_model(family)
    rollout = rollout_of(model)
    gradient = gradients(model, replayed(model, rollout, "exact"))
    name, parameter = next((n, p) for n, p in model.named_parameters() if part in n)
    torch.manual_seed(0)
    direction = torch.randn_like(parameter)
    step = 1e-6 * max(parameter.norm().item(), 0.1) / direction.norm().item()

    def moved(sign):
        with torch.no_grad():
            parameter.add_(sign * step * direction)
            value = replayed(model, (*rollout[:2], None, rollout[3]), 0).item()
            parameter.sub_(sign * step * direction)
        return value

    measured = (moved(1) - moved(-1)) / (2 * step)
    assert measured == pytest.approx((gradient[name] * direction).sum().item(), rel=1e-4)


def plant(monkeypatch, fault):
    """Let the adjoint take each state for that of one position later, or lose a term."""
    live, grad, products = adjoint.live_states, torch.autograd.grad, []

    def shifted(hidden, width, head):
        return live(torch.cat([hidden[:, 1:], hidden[:, -1:]], 1), width, head)

    def skipping(outputs, inputs, grad_outputs, **options):
        (product,) = grad(outputs, inputs, grad_outputs, **options)
        products.append(product)
        return (product * (len(products) != 3),)  # the second term

    if fault == "shifted":
        monkeypatch.setattr(adjoint, "live_states", shifted)
    if fault == "skipped":
        monkeypatch.setattr(torch.autograd, "grad", skipping)


@pytest.mark.parametrize("fault", ["shifted", "skipped", "no mask"])
def test_a_shift_a_skipped_term_and_a_missing_mask_are_seen(family, fault, monkeypatch, float64_everywhere):
    model = thinking_model(family)
    rollout = rollout_of(model)
    expected = gradients(model, decoded(model, rollout))
    plant(monkeypatch, fault)
    found = gradients(model, replayed(model, rollout, "exact", with_mask=fault != "no mask"))
    assert difference(found, expected) > 1e-2


@every_family
@pytest.mark.parametrize("bptt", [3, "exact", "sequential"])
def test_gradient_checkpointing_changes_nothing(family, bptt):
    model = thinking_model(family)
    rollout = rollout_of(model)
    expected = gradients(model, replayed(model, rollout, bptt))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert difference(gradients(model, replayed(model, rollout, bptt)), expected) < 1e-9
    assert all(layer.gradient_checkpointing for layer in model.model.layers)


@pytest.mark.parametrize("bptt", [3, "exact", "sequential"])
def test_data_parallel_training_sees_one_forward_and_one_backward(family, bptt, tmp_path):
    model = thinking_model(family)
    rollout = rollout_of(model)
    expected = gradients(model, replayed(model, rollout, bptt))
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)  # every weight is used, once
        found = gradients(wrapped, replayed(wrapped, rollout, bptt))
        nobody = (*rollout[:3], torch.zeros_like(rollout[3]))
        for _ in range(2):  # also where nobody thinks, or the second forward would wait for gradients of the first
            replayed(wrapped, nobody, bptt).backward()
        del wrapped  # before its process group: whose last owner it would be, and may then wait for the group for ever
    finally:
        torch.distributed.destroy_process_group()
    assert difference({name.removeprefix("module."): g for name, g in found.items()}, expected) < 1e-9


def test_accumulated_batches_add_up(family, float64_everywhere):
    model = thinking_model(family)
    tokens, attention, states, mask = rollout_of(model)
    halves = [[value[rows] for value in (tokens, attention, states, mask)] for rows in (slice(0, 3), slice(3, 8))]
    expected = gradients(model, sum(decoded(model, half) for half in halves))
    model.zero_grad()
    for half in halves:
        replayed(model, half, "exact").backward()
    assert difference({n: p.grad for n, p in model.named_parameters()}, expected) < EXACT


@pytest.mark.parametrize(
    ("dtype", "bound", "checkpointed"), [(torch.bfloat16, 0.05, False), (torch.float16, 0.02, True)]
)
def test_under_autocast_the_adjoint_rounds_as_sequential_decoding_does(family, residual, dtype, bound, checkpointed):
    tokens, attention, _, mask = rollout_of(thinking_model(family))
    calm = {"residual": residual, "r_min": 0.5, "r_max": 0.9}
    model = tiny_model(family, thinking=calm, initializer_range=0.1).train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def gradient(bptt, scale=1.0, autocast=True):
        with torch.autocast("cpu", dtype, enabled=autocast):
            value = replayed(model, (tokens, attention, None, mask), bptt)
        return torch.cat([g.flatten() for g in gradients(model, scale * value).values()]) / scale

    true = gradient("exact", autocast=False)
    exact, sequential, published = ((gradient(b) - true).norm() / true.norm() for b in ("exact", "sequential", 0))
    assert exact < bound and exact < 1.5 * sequential + 1e-3 and published > 2 * exact
    assert (gradient("exact", 2.0**4) - true).norm() / true.norm() < bound  # as a loss scaler does


def test_a_gradient_that_is_no_number_or_zero_ends_the_series(family):
    model = thinking_model(family)
    rollout = rollout_of(model)
    seen = []
    rule = adjoint.Bptt("exact", observe=seen.append)
    tokens, attention, states, mask = rollout
    for factor in (float("nan"), 0.0):
        inputs = adjoint.ThinkingInputs(states, mask, None, rule)
        out = model(tokens, attention_mask=attention, thinking_inputs=inputs, use_cache=False)
        found = gradients(model, factor * out.logits.sum())
        assert all((g.isnan() if factor != 0 else g == 0).all() for n, g in found.items() if "projection" in n)
    assert not seen


def test_thoughts_with_gaps_are_exact(family, float64_everywhere):
    model = thinking_model(family)
    tokens, attention, _, mask = rollout_of(model)
    mask = mask.clone()
    mask[:, 2], mask[:, 5:] = False, False  # and five plain columns behind the last thought
    states = thinking_roll(model, tokens, attention, mask, TEMPERATURE)
    rollout = (tokens, attention, states, mask)
    expected = gradients(model, decoded(model, rollout))
    for bptt in ("exact", "sequential"):
        assert difference(gradients(model, replayed(model, rollout, bptt)), expected) < EXACT
    nothing = (tokens, attention, states, torch.zeros_like(mask))
    for bptt in ("exact", "sequential"):
        assert replayed(model, nothing, bptt).item() == pytest.approx(replayed(model, nothing, 0).item(), abs=1e-9)


@every_family
def test_given_positions_are_those_of_every_product(family, float64_everywhere):
    model = thinking_model(family)
    tokens, attention, _, mask = rollout_of(model)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens) * 3  # which are not those that a forward would take
    untold = (tokens, attention, None, mask)
    found = gradients(model, replayed(model, untold, "exact", position_ids=positions))
    expected = gradients(model, replayed(model, untold, "sequential", position_ids=positions))
    assert difference(found, expected) < EXACT
    assert difference(gradients(model, replayed(model, untold, "exact")), expected) > 1e-2


def test_a_control_and_given_positions_are_those_of_states_that_are_made_again(family, float64_everywhere):
    model = thinking_model(family)
    tokens, attention, _, mask = rollout = rollout_of(model)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens) * 3
    with controlled(model, "mean"):
        for options in ({}, {"position_ids": positions}):
            found = replayed(model, rollout, "exact", stale=True, **options)
            expected = replayed(model, (tokens, attention, None, mask), "sequential", **options)
            assert found.item() == pytest.approx(expected.item(), rel=1e-6)
            assert difference(gradients(model, found), gradients(model, expected)) < EXACT


def test_a_graph_that_is_retained_is_good_for_another_backward(family, float64_everywhere):
    model = thinking_model(family)
    rollout = rollout_of(model)
    value = replayed(model, rollout, "exact")
    value.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in model.named_parameters()}
    again = gradients(model, value)
    assert difference(again, once) < 1e-12
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


def test_a_loss_on_the_prompt_does_not_end_the_series_early(float64_everywhere):
    model = thinking_model("llama")
    tokens, attention, states, mask = rollout_of(model)

    def loss(bptt):
        out = replay_forward(
            model, tokens, attention, thinking_states=states, thinking_mask=mask, bptt=bptt, temperature=TEMPERATURE
        )
        logps = out.logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
        width = mask.shape[1]
        return 1000 * (logps * attention[:, 1:])[:, : -width - 1].sum() + logps[:, -width:].sum()

    exact, sequential = gradients(model, loss("exact")), gradients(model, loss("sequential"))
    name = "model.thinking_projection.weight"
    assert (exact[name] - sequential[name]).norm() < 1e-2 * sequential[name].norm()


def test_a_control_stands_in_every_product(family, float64_everywhere):
    model = thinking_model(family)
    tokens, attention, _, mask = rollout_of(model)
    with controlled(model, "mean"):
        value = replayed(model, (tokens, attention, None, mask), "exact")
        expected = gradients(model, replayed(model, (tokens, attention, None, mask), "sequential"))
    assert difference(gradients(model, value), expected) < EXACT  # the control is gone by the time of the backward


def test_the_embedding_residuals_logits_are_made_in_chunks(family, monkeypatch):
    model = thinking_model(family, "embedding")
    rollout = rollout_of(model)
    expected = gradients(model, replayed(model, rollout, "exact"))
    monkeypatch.setattr(adjoint, "_LOGITS", 2 * 8 * model.config.vocab_size)  # two columns of eight rows
    assert difference(gradients(model, replayed(model, rollout, "exact")), expected) < 1e-9


@pytest.mark.parametrize(
    ("family", "window"),
    [("qwen2", {"use_sliding_window": True, "max_window_layers": 0}), ("mistral", {})],
)
def test_a_sliding_window_slides_in_every_product(family, window, float64_everywhere):
    model = thinking_model(family, sliding_window=4, **window)
    rollout = rollout_of(model)
    expected = gradients(model, decoded(model, rollout))
    for bptt in ("exact", "sequential"):
        assert difference(gradients(model, replayed(model, rollout, bptt)), expected) < EXACT


def test_a_roll_of_given_tokens_has_the_states_of_the_rollout_that_sampled_them(family, residual, tokenizer):
    model = tiny_model(family, thinking={"residual": residual, "r_min": 0.8, "r_max": 0.95})
    inputs = ragged(tokenizer)
    out = sample(model, tokenizer, inputs, biased=False, max_new_tokens=8)  # rounding is fed back, and grows
    attention = torch.cat([inputs["attention_mask"], torch.ones_like(completions(out, inputs))], 1)
    states = thinking_roll(model, out.sequences, attention, out.thinking_mask, TEMPERATURE)
    assert (states - out.thinking_states)[out.thinking_mask].abs().max() < 1e-3
    for bptt in (0, 1, "exact", "sequential"):  # on policy, each has the rollout's values
        logits = replay_forward(
            model,
            out.sequences,
            attention,
            thinking_states=out.thinking_states,
            thinking_mask=out.thinking_mask,
            bptt=bptt,
            temperature=TEMPERATURE,
        ).logits[:, inputs["input_ids"].shape[1] - 1 : -1]
        logps = (logits / TEMPERATURE).log_softmax(-1).gather(-1, completions(out, inputs)[..., None])[..., 0]
        assert (logps - sampled_logps(out, inputs))[out.thinking_mask].abs().max() < 1e-4, bptt


@pytest.mark.parametrize("bptt", ["exact", 2])
def test_stale_states_are_made_again_so_that_values_and_gradient_are_todays(
    family, residual, bptt, float64_everywhere
):
    model = thinking_model(family, residual)
    rollout = rollout_of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    depth = None if bptt == "exact" else bptt
    value = decoded(model, rollout, depth)
    found = replayed(model, rollout, bptt, stale=True)
    assert found.item() == pytest.approx(value.item(), rel=1e-6)
    assert difference(gradients(model, found), gradients(model, value)) < EXACT
    assert (
        difference(gradients(model, replayed(model, rollout, bptt)), gradients(model, decoded(model, rollout))) > 0.01
    )


def test_stale_states_that_do_not_stand_still_are_decoded(family, float64_everywhere):
    model = thinking_model(family)
    rollout = rollout_of(model)
    with torch.no_grad():
        model.model.thinking_projection.weight.add_(torch.randn(32, 32).double())
    expected = gradients(model, decoded(model, rollout))
    assert difference(gradients(model, replayed(model, rollout, "exact", stale=True, bptt_terms=1)), expected) < EXACT


@every_family
@pytest.mark.parametrize("told", [{}, {"output_hidden_states": True}], ids=["stretches", "one"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_products_do_not_go_through_the_prompt(family, checkpointed, told):
    model = thinking_model(family).train()
    tokens, attention, states, mask = rollout_of(model)
    prompt, width = tokens.shape[1] - mask.shape[1], mask.shape[1]
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    read, credited = [], []

    def note(module, args, kwargs, output):
        output = output[0] if isinstance(output, tuple) else output
        read.append(output.shape[1])
        if output.requires_grad:
            output.register_hook(lambda g: credited.append(g.shape[1]))

    model.model.layers[-1].register_forward_hook(note, with_kwargs=True)
    given = {"thinking_states": states, "thinking_mask": mask} | told
    logits = replay_forward(model, tokens, attention, bptt=2, **given).logits
    if checkpointed or told:  # checkpointing drops keys and values, and hooks capture what one forward does
        assert read == [prompt + width]
    else:
        assert read == [prompt, width]
        logits.sum().backward()
        assert sorted(credited) == sorted([prompt, width, width, width])


def test_what_was_measured_is_handed_over(family):
    model = thinking_model(family)
    tokens, attention, states, mask = rollout_of(model)
    seen = {}
    for bptt in ("exact", 3):
        rule = adjoint.Bptt(bptt, 1e-6, stale=True, observe=seen.update)
        inputs = adjoint.ThinkingInputs(states, mask, None, rule)
        model(tokens, attention_mask=attention, thinking_inputs=inputs, use_cache=False).logits.sum().backward()
        assert seen["bptt/terms"] == (3 if bptt == 3 else 7)
        assert seen["bptt/remainder"] == 0 if bptt == "exact" else seen["bptt/remainder"] > 1e-6  # seven thoughts
        assert seen["bptt/gain"] > 0.1 and seen["bptt/refreshes"] >= 1
    found, whole = {}, {}  # the latter by width: prompts and completions are read one after the other; last wins
    model.model.norm.register_forward_hook(
        lambda module, args, hidden: hidden.register_hook(lambda g: whole.update({g.shape[1]: g.flatten()})) and None
    )
    given = {"thinking_states": states, "thinking_mask": mask, "output_last_hidden_state": True}
    out = replay_forward(model, tokens, attention, bptt="exact", observe=seen.update, **given)
    out.last_hidden_state.register_hook(lambda g: found.update(published=g))
    out.logits.sum().backward()
    assert seen["bptt/gain"] == pytest.approx(
        (torch.cat(list(whole.values())).norm() / found["published"].norm()).item(), rel=1e-6
    )
    assert abs(seen["bptt/gain"] - 1) > 1e-3


def test_a_series_that_grows_is_computed_to_its_end_with_a_warning(family, float64_everywhere, caplog):
    model = thinking_model(family)
    rollout = rollout_of(model)
    expected = gradients(model, decoded(model, rollout))
    adjoint.logger.warning_once.cache_clear()
    found = gradients(model, replayed(model, rollout, "exact", bptt_terms=2))
    assert difference(found, expected) < EXACT and "has not converged" in caplog.text


def test_one_forward_has_one_dropout_mask_and_the_states_are_without(family):
    model = thinking_model(family, attention_dropout=0.2)
    rollout = rollout_of(model)

    def seeded(bptt, states=rollout[2]):
        torch.manual_seed(3)
        return gradients(model, replayed(model, (*rollout[:2], states, rollout[3]), bptt))

    again, exact = seeded("exact"), seeded("exact")
    assert all(torch.equal(again[name], g) for name, g in exact.items())
    assert difference(seeded("exact", None), exact) < 1e-9  # a roll draws no mask
    assert difference(seeded(0), exact) > 0.05
    assert difference(gradients(model.eval(), replayed(model, rollout, "exact")), exact) > 1e-3


def test_sequential_refuses_dropout_by_name():
    attention = thinking_model("llama", attention_dropout=0.1)
    projection = thinking_model("llama")
    projection.config.thinking["projection_dropout"] = 0.2
    lora = thinking_model("llama", lora=True)
    lora.base_model.model.model.layers[0].self_attn.q_proj.lora_dropout["default"] = Dropout(0.3)
    for model, name in ((attention, "attention_dropout"), (projection, "projection_dropout"), (lora, "lora_dropout")):
        rollout = rollout_of(model)
        with pytest.raises(InputError, match=f"{name}.* is 0.[123]"):
            replayed(model, rollout, "sequential")
        assert replayed(model.eval(), rollout, "sequential").isfinite()
    model = tiny_model("llama", thinking=FELT)
    adapter = LoraConfig(target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False)
    model = get_peft_model(model, adapter).double().train()
    with pytest.raises(InputError, match="lora_dropout.* is 0.5"):
        replayed(model, rollout_of(model), "sequential")


@pytest.mark.parametrize("bptt", [-1, 1.5, True, "most", None, "-1"])
def test_a_depth_that_cannot_be_is_refused(bptt):
    model = thinking_model("llama")
    with pytest.raises(InputError, match="bptt must be a whole number from 0, 'exact' or 'sequential'"):
        replayed(model, rollout_of(model), bptt)


@pytest.mark.parametrize("bptt", [2, "exact", "sequential"])
def test_what_has_no_gradient_through_thoughts_is_refused(bptt):
    model = thinking_model("llama")
    tokens, attention, states, mask = rollout_of(model)
    whole = {"thinking_states": torch.zeros(*tokens.shape, 32).double(), "thinking_mask": torch.ones_like(tokens) > 0}
    given = {"thinking_states": states, "thinking_mask": mask}
    with pytest.raises(InputError, match="K < L"):
        replay_forward(model, tokens, attention, bptt=bptt, **whole)
    with pytest.raises(InputError, match=r"attention_mask \(B, L\)"):
        replay_forward(model, tokens, attention[:, None, None] > 0, bptt=bptt, **given)
    with pytest.raises(InputError, match="remove past_key_values"):
        replay_forward(model, tokens, attention, bptt=bptt, past_key_values=DynamicCache(), **given)
    with pytest.raises(InputError, match="must be bool"):
        replay_forward(model, tokens, attention, bptt=bptt, **given | {"thinking_mask": mask.long()})
    inputs = adjoint.ThinkingInputs(states, mask, "embedding", adjoint.Bptt(bptt))
    with pytest.raises(InputError, match="replay_forward"):
        model(tokens, thinking_inputs=inputs)
    with pytest.raises(InputError, match="plain model"):
        tiny_model("llama", thinking=None)(tokens, thinking_inputs=inputs)
    for options in ({"use_reentrant": True}, {"preserve_rng_state": True}) if bptt != "sequential" else ():
        model.train().gradient_checkpointing_enable(options)
        with pytest.raises(InputError, match="'use_reentrant': False"):
            replay_forward(model, tokens, attention, bptt=bptt, **given)
        assert replayed(model.eval(), (tokens, attention, states, mask), bptt).isfinite()
    with pytest.raises(InputError, match="0 < K < L"):
        replay_forward(model, tokens, attention, bptt=bptt, thinking_mask=mask[:, :0])
