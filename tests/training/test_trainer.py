"""HRPOTrainer: the new path is taken, gets a gradient and changes; the reference does not think; misuse is refused."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from rollouts import TEMPERATURE
from runs import config, lora, small_trainer
from tiny import byte_tokenizer, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, TrainerCallback
from transformers.modeling_outputs import CausalLMOutputWithPast
from trl import GRPOConfig

from hrpo_patches import HRPOTrainer
from hrpo_patches.engines.base import Completions
from hrpo_thinking.errors import InputError
from hrpo_thinking.inputs import ThinkingInputs
from hrpo_thinking.parts import is_thinking_parameter, parts_of

RESIDUALS = ["projection", "embedding"]


def watch_gradients(trainer):
    """A dict that the next optimizer step fills with each trainable parameter's gradient."""
    gradients = {}

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            gradients.update({n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad})
            gradients.update({n: g.clone() for n, g in gradients.items() if g is not None})

    trainer.add_callback(Watch())
    return gradients


def snapshot(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("family", "residual", "dtype"),
    [
        ("llama", "projection", torch.float32),
        ("llama", "projection", torch.bfloat16),
        ("llama", "embedding", torch.bfloat16),
        ("qwen2", "projection", torch.bfloat16),
        ("qwen3", "projection", torch.float32),
        ("qwen3", "embedding", torch.float32),
    ],
)
def test_one_step_reaches_and_changes_every_thinking_and_lora_weight_and_nothing_else(
    family, residual, dtype, tmp_path
):
    model = tiny_model(family, thinking={"r_min": 0.5, "r_max": 0.9}).to(dtype)
    trainer = small_trainer(tmp_path, model=model, residual=residual)
    before, gradients = snapshot(trainer.model), watch_gradients(trainer)
    trainer.train()
    trainable = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    for module in parts_of(residual):
        assert [name for name in trainable if f".{module}.modules_to_save.default." in name]
    assert bool([n for n in trainable if "thinking_projection" in n]) == (residual == "projection")
    assert [name for name in trainable if "lora_A" in name] and [name for name in trainable if "lora_B" in name]
    for name, parameter in trainer.model.named_parameters():
        changed = not torch.equal(parameter, before[name])
        assert changed == (name in trainable), name
        if name in trainable:
            assert gradients[name].isfinite().all() and gradients[name].abs().sum() > 0, name
            assert parameter.dtype == torch.float32, name


def test_every_element_of_lambda_with_a_gradient_moves_on_a_bf16_base(tmp_path):
    trainer = small_trainer(tmp_path, model=tiny_model("llama").to(torch.bfloat16))
    before, gradients = snapshot(trainer.model), watch_gradients(trainer)
    trainer.train()
    (name,) = [name for name in gradients if name.endswith("default.Lambda")]
    moved = trainer.model.get_parameter(name) != before[name]
    assert torch.equal(moved, gradients[name] != 0) and moved.any()


def test_the_base_that_trl_casts_to_bf16_keeps_float32_thinking(tmp_path):
    model = tiny_model("llama").to(torch.bfloat16)
    model.is_loaded_in_4bit = True  # makes TRL cast every trainable weight, as it does for QLoRA
    expected = {n: p.clone() for n, p in model.named_parameters() if is_thinking_parameter(n)}
    trainer = small_trainer(tmp_path, model=model)
    for name, parameter in trainer.model.named_parameters():
        if is_thinking_parameter(name) and parameter.requires_grad:
            plain = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
            assert parameter.dtype == torch.float32 and torch.equal(parameter, expected[plain])
        elif parameter.requires_grad:
            assert parameter.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("family", "residual", "accumulation"),
    [("llama", "projection", 2), ("llama", "embedding", 1), ("qwen2", "projection", 1), ("qwen3", "embedding", 2)],
)
def test_the_loss_replays_the_log_probabilities_of_the_rollout(family, residual, accumulation, tmp_path):
    trainer = small_trainer(
        tmp_path, family, residual=residual, temperature=TEMPERATURE, gradient_accumulation_steps=accumulation
    )
    seen, steps = {}, []
    generate, score = trainer.model.base_model.model.generate, trainer._get_per_token_logps_and_entropies

    trainer.generation_config.output_scores = True

    def generating(*args, **kwargs):
        out = generate(*args, **kwargs)
        tokens = out.sequences[:, -len(out.scores) :]
        logps = torch.stack(out.scores, 1).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        seen.update({tuple(row.tolist()): logp for row, logp in zip(tokens, logps, strict=True)})
        return out

    def scoring(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        result = score(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        if torch.is_grad_enabled():
            for row, mask, logp in zip(input_ids, attention_mask, result[0], strict=True):
                tokens, length = row[-logits_to_keep:].tolist(), int(mask[-logits_to_keep:].sum())
                expected = [value for key, value in seen.items() if list(key)[:length] == tokens[:length]]
                steps.append(min((logp.detach()[:length] - e[:length]).abs().max().item() for e in expected))
        return result

    trainer.model.base_model.model.generate = generating
    trainer._get_per_token_logps_and_entropies = scoring
    trainer.train()
    assert len(steps) == 8 * accumulation and max(steps) < 1e-4


def test_the_reference_of_the_kl_is_the_base_model_without_thinking(tmp_path):
    model = tiny_model("llama", thinking={"r_min": 0.5, "r_max": 0.9})
    trainer, seen = small_trainer(tmp_path, model=model, beta=0.1), []
    score = trainer._get_per_token_logps_and_entropies

    def scoring(scored, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        result = score(scored, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        if not torch.is_grad_enabled():
            seen.append((input_ids, attention_mask, logits_to_keep, result[0]))
        return result

    trainer._get_per_token_logps_and_entropies = scoring
    trainer.train()
    base = tiny_model("llama", thinking=False)
    assert seen
    for input_ids, attention_mask, width, logps in seen:
        logits = base(input_ids, attention_mask).logits[:, -width - 1 : -1].log_softmax(-1)
        expected = logits.gather(-1, input_ids[:, -width:, None])[..., 0]
        mask = attention_mask[:, -width:].bool()
        torch.testing.assert_close(logps[mask], expected[mask], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("residual", ["projection", "embedding", "none"])
def test_thinking_weights_that_a_run_does_not_use_are_frozen(tmp_path, residual):
    trainer = small_trainer(tmp_path, peft_config=None, beta=0.0, residual=residual)
    used = parts_of(residual) if residual != "none" else []
    for name, parameter in trainer.model.named_parameters():
        assert parameter.requires_grad == (not is_thinking_parameter(name) or name.split(".")[1] in used), name
    trainer.train()


def test_the_separate_reference_of_a_full_fine_tuning_does_not_think(tmp_path):
    model = tiny_model("llama", thinking=None)
    model.save_pretrained(tmp_path / "base")
    trainer = small_trainer(tmp_path / "run", model=str(tmp_path / "base"), peft_config=None, beta=0.1)
    trainer._thinking = ThinkingInputs(torch.randn(1, 3, 32), torch.ones(1, 3, dtype=torch.bool), "projection")
    ids = torch.randint(0, 200, (1, 8))
    logps, _, _ = trainer._get_per_token_logps_and_entropies(trainer.ref_model, ids, torch.ones_like(ids), 3)
    expected = model(ids).logits[:, -4:-1].log_softmax(-1).gather(-1, ids[:, -3:, None])[..., 0]
    torch.testing.assert_close(logps, expected)
    thinking, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), 3)
    assert (thinking - expected).abs().max() > 1e-4


def test_log_probabilities_are_the_same_in_chunks(tmp_path):
    trainer = small_trainer(tmp_path)
    trainer._thinking = ThinkingInputs(torch.randn(5, 3, 32), torch.rand(5, 3) > 0.5, "projection")
    ids = torch.randint(0, 200, (5, 8))
    whole, entropies, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model, ids, torch.ones_like(ids), 3, compute_entropy=True
    )
    chunks, none, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model, ids, torch.ones_like(ids), 3, batch_size=2
    )
    torch.testing.assert_close(chunks, whole)
    assert entropies.shape == whole.shape and none is None


def test_completions_end_with_their_first_end_token(tmp_path):
    trainer = small_trainer(tmp_path)
    end = byte_tokenizer().eos_token_id
    trainer.generation_config.sequence_bias = {(end,): 5.0}
    completions, _ = trainer._think([[1, 2, 3]] * 16)
    assert all(end not in ids[:-1] for ids in completions) and any(ids[-1] == end for ids in completions)
    rollout = trainer._thinking
    for ids, mask in zip(completions, rollout.mask, strict=True):
        assert mask[0] and not mask[len(ids) :].any()


def test_the_ratios_are_means_over_thinking_positions(tmp_path):
    trainer = small_trainer(tmp_path)
    ratio = torch.tensor([[0.6, 0.8, 1.0], [0.8, 1.0, 1.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    thinking = ThinkingInputs(torch.zeros(2, 3, 1), mask, "projection")
    trainer._record_ratios(Completions([], None, thinking, ratio).shares())
    metrics = trainer._metrics["train"]
    assert metrics["embeds_ratio"] == [pytest.approx(2.2 / 3)]
    assert metrics["hidden_ratio"] == [pytest.approx((0.8 + 0.6 + 0.6) / 3)]


def test_going_on_from_an_adapter_also_takes_the_bare_base_as_reference(tmp_path):
    model = get_peft_model(tiny_model("llama"), lora(modules_to_save=parts_of("projection")))
    trainer = small_trainer(tmp_path, model=model, peft_config=None, beta=0.1)
    assert list(trainer.model.peft_config) == ["default"]
    trainer.train()


def test_plain_grpo_runs_through_the_same_trainer_and_trains_no_thinking(tmp_path):
    trainer = small_trainer(tmp_path, residual="none")
    before = snapshot(trainer.model)
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        if is_thinking_parameter(name):
            assert torch.equal(parameter, before[name]) and not parameter.requires_grad
    assert "embeds_ratio" not in trainer.state.log_history[0] and "marker_rate" in trainer.state.log_history[0]


def test_a_model_without_peft_is_trained_whole(tmp_path):
    trainer = small_trainer(tmp_path, peft_config=None, beta=0.0)
    before = snapshot(trainer.model)
    trainer.train()
    assert all(not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if p.grad is not None)
    assert not torch.equal(trainer.model.model.thinking_projection.weight, before["model.thinking_projection.weight"])


def test_the_log_holds_the_metrics_of_thinking(tmp_path):
    trainer = small_trainer(tmp_path)
    trainer.train()
    log = trainer.state.log_history[0]
    assert 0.5 < log["embeds_ratio"] < 1
    assert 0 < log["hidden_ratio"] < 1
    assert log["marker_rate"] in [i / 8 for i in range(9)]
    assert log["projection/weight_norm"] > 0 and log["projection/grad_norm"] > 0
    assert log["Lambda/min"] < log["Lambda/max"]


def strip(model):
    forward = model.forward

    def bare(*args, **kwargs):
        out = forward(*args, **kwargs)
        return CausalLMOutputWithPast(loss=out.loss, logits=out.logits, past_key_values=out.past_key_values)

    model.forward = bare
    return model


def test_a_forward_without_hidden_state_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(InputError, match="returns no last_hidden_state"):
        small_trainer(tmp_path, model=strip(tiny_model("llama")))
    trainer = small_trainer(tmp_path)
    strip(trainer.model.base_model.model)
    with (
        pytest.warns(UserWarning, match="last_hidden_state"),
        pytest.raises(InputError, match="instead of projection"),
    ):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_model_that_cannot_think_is_refused(tmp_path):
    other = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(InputError, match="GPT2LMHeadModel cannot think"):
        small_trainer(tmp_path, model=other)
    other.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(InputError, match="is a gpt2 model"):
        small_trainer(tmp_path, model=str(tmp_path / "gpt2"))


def test_a_thinking_checkpoint_is_not_turned_into_another_kind(tmp_path):
    tiny_model("llama", thinking={"residual": "embedding"}).save_pretrained(tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for model in (loaded, str(tmp_path / "base")):
        with pytest.raises(InputError, match="trained with residual='embedding', not 'projection'"):
            small_trainer(tmp_path / "run", model=model)
    small_trainer(tmp_path / "run", model=loaded, residual="embedding")


def test_frozen_thinking_weights_are_refused(tmp_path):
    def wrapped(modules):
        return get_peft_model(tiny_model("llama"), lora(modules_to_save=modules))

    everything = parts_of("projection")
    for name in everything:
        model = wrapped([other for other in everything if other != name])
        with pytest.raises(InputError, match=f"{name} is frozen, or would not be saved"):
            small_trainer(tmp_path, model=model, peft_config=None)
    bare = get_peft_model(tiny_model("llama"), lora())
    for name in everything:
        getattr(bare.base_model.model.model, name).requires_grad_(True)
    with pytest.raises(InputError, match="would not be saved"):
        small_trainer(tmp_path, model=bare, peft_config=None)


def test_a_marker_that_the_tokenizer_cannot_produce_is_refused(tmp_path, monkeypatch):
    tokenizer = byte_tokenizer()
    monkeypatch.setattr(tokenizer, "get_vocab", lambda: {letter: i for i, letter in enumerate("abcdef")})
    data = Dataset.from_dict({"prompt": ["abc"]})
    with pytest.raises(InputError, match="answer marker"):
        HRPOTrainer(
            tiny_model("llama"), lambda **_: [0.0], config(tmp_path, beta=0.0), data, processing_class=tokenizer
        )


def test_arguments_that_do_not_think_are_refused(tmp_path):
    with pytest.raises(InputError, match="needs args=HRPOConfig"):
        HRPOTrainer(tiny_model("llama"), args=GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False))
    with pytest.raises(InputError, match="rollout_func generates outside"):
        HRPOTrainer(tiny_model("llama"), args=config(tmp_path), rollout_func=lambda prompts: {})


def test_a_model_given_by_name_gets_its_thinking_from_the_arguments(tmp_path):
    model = tiny_model("llama", thinking=None)
    model.save_pretrained(tmp_path / "base")
    trainer = small_trainer(tmp_path / "run", model=str(tmp_path / "base"), residual="embedding", answer_start="###")
    assert isinstance(trainer.model, PeftModel)
    thinking = trainer.model.config.thinking
    assert (thinking["residual"], thinking["answer_start"]) == ("embedding", "###")
    assert tiny_config("llama", thinking=None).thinking is None


@pytest.mark.parametrize(
    "options", [{"gradient_checkpointing": True}, {"bf16": True}, {"num_iterations": 2, "max_steps": 2}]
)
def test_the_usual_options_of_grpo_train_the_projection_too(tmp_path, options):
    trainer = small_trainer(tmp_path, **options)
    before, gradients = snapshot(trainer.model), watch_gradients(trainer)
    trainer.train()
    (name,) = [name for name in gradients if "thinking_projection" in name]
    assert gradients[name].isfinite().all() and gradients[name].abs().sum() > 0
    assert not torch.equal(trainer.model.get_parameter(name), before[name])


def test_the_old_log_probabilities_of_several_iterations_replay_the_thinking_too(tmp_path):
    trainer, differences = small_trainer(tmp_path, num_iterations=2, max_steps=1), []
    loss, score = trainer._compute_loss, trainer._get_per_token_logps_and_entropies

    def losing(model, inputs):
        trainer.current = inputs
        return loss(model, inputs)

    def scoring(*args, **kwargs):
        result = score(*args, **kwargs)
        if torch.is_grad_enabled():
            mask = trainer.current["completion_mask"].bool()
            differences.append((result[0] - trainer.current["old_per_token_logps"])[mask].abs().max().item())
        return result

    trainer._compute_loss, trainer._get_per_token_logps_and_entropies = losing, scoring
    trainer.train()
    assert differences and differences[0] < 1e-5


def test_evaluation_thinks_as_well(tmp_path):
    trainer = small_trainer(tmp_path, per_device_eval_batch_size=4)
    metrics = trainer.evaluate(Dataset.from_dict({"prompt": ["abc"] * 4}))
    assert 0.5 < metrics["eval_embeds_ratio"] < 1 and "eval_marker_rate" in metrics


def test_lora_on_all_linear_layers_leaves_the_thinking_modules_whole(tmp_path):
    trainer = small_trainer(tmp_path, peft_config=LoraConfig(target_modules="all-linear"))
    names = [name for name, p in trainer.model.named_parameters() if p.requires_grad and "thinking" in name]
    assert names and not [name for name in names if "lora" in name]
    trainer.train()


def test_a_completion_that_ends_with_a_stop_string_has_no_padding_under_its_mask(tmp_path):
    trainer = small_trainer(tmp_path, generation_kwargs={"stop_strings": ["a", "e", "i"]}, max_completion_length=16)
    pad = byte_tokenizer().pad_token_id
    trainer.generation_config.sequence_bias = {(pad,): -100.0}  # a random model might say it
    completions, _ = trainer._think([[1, 2, 3]] * 32)
    texts = byte_tokenizer().batch_decode(completions)
    assert len(set(map(len, completions))) > 1 and not any(pad in ids for ids in completions)
    end = byte_tokenizer().eos_token_id
    for ids, text in zip(completions, texts, strict=True):
        assert len(ids) == 16 or ids[-1] == end or any(stop in text for stop in "aei"), text
