"""Training on rollouts in vLLM: the engine has the trainer's weights, the replay its log-probabilities."""

import copy

from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from engines import big_enough
from runs import PROMPTS, assert_all_thinking_parts_moved, config, lengths_differ, lora, small_trainer
from tiny import byte_tokenizer
from transformers import AutoModelForCausalLM

from hrpo_patches import HRPOConfig, HRPOTrainer
from hrpo_patches.engines.vllm import ThinkingVLLM
from hrpo_thinking.errors import InputError
from hrpo_thinking.marker import marker_table
from hrpo_thinking.parts import MODULES
from hrpo_thinking.inputs import ThinkingInputs

VLLM = {
    "use_vllm": True,
    "vllm_mode": "colocate",
    "vllm_max_model_length": 256,
    "use_cpu": not torch.cuda.is_available(),
}


pytestmark = pytest.mark.usefixtures("engines_end")


@pytest.fixture
def base(family, tokenizer, tmp_path):
    """A plain tiny model in a folder, loaded from there."""
    folder = tmp_path / "base"
    big_enough(family, thinking=None).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, thinking={"r_min": 0.5, "r_max": 0.9})


def run(folder, model, steps=3, **options):
    trainer = small_trainer(folder, model=model, max_steps=steps, **VLLM | options)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train(resume_from_checkpoint=options.pop("resume_from_checkpoint", None))
    return trainer, before


def assert_the_engine_has_the_trainers_weights(trainer):
    trainer.vllm_generation.sync_weights()
    engine = trainer.vllm_generation.weights()
    own = {name: weight.cpu() for name, weight in engine.named_parameters()}
    merged = copy.deepcopy(trainer.model).merge_and_unload()
    theirs = {name: weight.cpu() for name, weight in merged.named_parameters()}
    for name in [*(name for name in own if any(f".{part}." in name for part in MODULES)), "model.norm.weight"]:
        assert torch.equal(own[name], theirs[name]), name
    table = theirs["model.embed_tokens.weight"]
    torch.testing.assert_close(own["model.embed_tokens.weight"][: len(table)], table, rtol=0, atol=1e-6)
    for i, layer in enumerate(engine.model.layers):  # a CPU's kernels have packed these; what do they compute?
        stacked, names = layer.self_attn.qkv_proj, [f"model.layers.{i}.self_attn.{one}_proj.weight" for one in "qkv"]
        expected = torch.cat([theirs[name] for name in names])
        if hasattr(stacked, "cpu_linear"):
            computed = stacked.cpu_linear(torch.eye(expected.shape[1]), stacked.weight, None).T
        else:
            computed = stacked.weight.cpu()
        torch.testing.assert_close(computed, expected, rtol=0, atol=1e-6)
        if stacked.bias is not None:
            biases = torch.cat([theirs[name.replace("weight", "bias")] for name in names])
            torch.testing.assert_close(stacked.bias.cpu(), biases, rtol=0, atol=1e-6)


one_family = pytest.mark.parametrize("family", ["llama"], indirect=True)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("qwen2", {"thoughts": 2}),
        ("qwen3", {"bptt": "sequential"}),
        ("llama", {"reference": "start", "thinking": {"residual_scale": "embedding", "projection_layers": 2}}),
    ],
    ids=str,
    indirect=["family"],
)
def test_five_steps_move_every_thinking_weight_and_the_replay_says_what_the_engine_said(base, tmp_path, options):
    trainer, before = run(tmp_path / "run", base, steps=5, learning_rate=1e-3, **options)
    assert_all_thinking_parts_moved(trainer, before)
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 5
    for row in rows:
        assert 0.4 < row["embeds_ratio"] < 1 and row["projection/grad_norm"] > 0
        assert row["sampling/sampling_logp_difference/max"] < 1e-3  # of every completion token, at today's weights
    assert_the_engine_has_the_trainers_weights(trainer)


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {"target_modules": ["q_proj", "embed_tokens"]}), ("qwen2", {"lora_bias": True})],
    ids=str,
    indirect=["family"],
)
def test_adapters_of_embeddings_and_of_biases_reach_the_engine(base, tmp_path, options):
    peft_config = lora()
    for name, value in options.items():
        setattr(peft_config, name, value)
    trainer = small_trainer(tmp_path / "run", model=base, peft_config=peft_config, **VLLM)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    assert_the_engine_has_the_trainers_weights(trainer)


@one_family
@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("vllm_importance_sampling_mode", "token_truncate", 1.0),  # bounded by clip_max, not masked
        ("vllm_importance_sampling_clip_max", 0.5, 0.0),  # weights are nearly 1: above it, and masked
        ("vllm_importance_sampling_clip_min", 2.0, 0.0),
        ("vllm_importance_sampling_cap", 0.5, 0.0),
    ],
)
def test_the_options_of_the_importance_weights_reach_them(base, tmp_path, option, value, expected):
    trainer, _ = run(tmp_path / "run", base, steps=1, **{option: value})
    row = next(row for row in trainer.state.log_history if "loss" in row)
    assert row["sampling/importance_sampling_ratio/mean"] == pytest.approx(expected, abs=1e-2)


@one_family
def test_an_adapters_bias_that_vllm_has_no_place_for_is_refused(base, tmp_path):
    with pytest.raises(InputError, match="leave lora_bias out"):
        small_trainer(tmp_path, model=base, peft_config=lora(lora_bias=True), **VLLM)


@one_family
@pytest.mark.parametrize(
    "adapter", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "embed_tokens"]}], ids=str
)
def test_an_adapter_of_one_of_two_tied_weights_is_refused(family, tmp_path, adapter):
    big_enough(family, tie_word_embeddings=True, thinking=None).save_pretrained(tmp_path / "base")
    peft_config = lora()
    for name, value in adapter.items():
        setattr(peft_config, name, value)
    with pytest.raises(InputError, match="embeddings and head are tied"):
        small_trainer(tmp_path / "run", model=str(tmp_path / "base"), peft_config=peft_config, **VLLM)


@one_family
def test_the_engine_reads_by_the_trainers_tokenizer_also_where_the_folder_has_none(family, tmp_path):
    own = byte_tokenizer()
    own.add_tokens(["<answer>"])
    big_enough(family, thinking=None, vocab_size=len(own) + 7).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", thinking={"r_min": 0.5, "r_max": 0.9})
    args = config(tmp_path / "run", answer_start="<answer>", **VLLM)
    data = Dataset.from_dict({"prompt": PROMPTS * 8})
    trainer = HRPOTrainer(model, lengths_differ, args, data, processing_class=own, peft_config=lora())
    trainer.train()
    table = trainer.vllm_generation.weights().thoughts.table
    assert torch.equal(table, marker_table(own, "<answer>", model.config.vocab_size))


@one_family
def test_a_replay_without_thoughts_would_be_seen(base, tmp_path, monkeypatch):
    rows_of = ThinkingInputs.rows

    def forgetful(self, rows):
        return replace(rows_of(self, rows), mask=torch.zeros_like(self.mask[rows]))

    monkeypatch.setattr(ThinkingInputs, "rows", forgetful)
    trainer, _ = run(tmp_path / "run", base, steps=1)
    (row,) = [row for row in trainer.state.log_history if "loss" in row]
    assert row["sampling/sampling_logp_difference/max"] > 0.05


@one_family
def test_a_resumed_run_is_the_whole_one(base, tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 2, "temperature": 1.0, "lr_scheduler_type": "constant"}
    whole, _ = run(tmp_path / "whole", copy.deepcopy(base), steps=4, **saved)
    again, _ = run(tmp_path / "again", copy.deepcopy(base), steps=2, **saved)
    last = str(tmp_path / "again" / "checkpoint-2")
    rest, _ = run(tmp_path / "again", base, steps=4, resume_from_checkpoint=last, **saved)
    keys = ("loss", "reward", "grad_norm", "embeds_ratio")
    logs = [[{k: row[k] for k in keys} for row in one.state.log_history if "loss" in row] for one in (whole, rest)]
    assert logs[0] == logs[1] and again.state.global_step == 2


@one_family
def test_plain_grpo_runs_in_the_same_engine_which_is_then_vllms_own(base, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(base.name_or_path)
    trainer, _ = run(tmp_path / "run", plain, steps=2, residual=None)
    assert type(trainer.vllm_generation.weights()).__module__.startswith("vllm.")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"residual": "embedding"}, "hands over no distribution"),
        ({"vllm_mode": "server"}, "vllm_mode='server' cannot think"),
        ({"vllm_tensor_parallel_size": 2}, "vllm_tensor_parallel_size=2 cannot think"),
        ({"vllm_model_impl": "transformers"}, "cannot think"),
        ({"residual": None, "thoughts": 2}, "only generate supports"),
    ],
    ids=str,
)
def test_what_cannot_think_in_vllm_is_refused_before_any_work(tmp_path, options, says):
    with pytest.raises(InputError, match=says):
        HRPOConfig(output_dir=str(tmp_path), **VLLM | options)


@one_family
def test_a_model_of_no_folder_is_refused_in_a_sentence(family, tmp_path):
    model = big_enough(family)
    with pytest.raises(InputError, match="load it from a folder"):
        small_trainer(tmp_path, model=model, **VLLM)


@one_family
def test_the_engine_says_when_no_weights_have_arrived(base, tmp_path):
    trainer = small_trainer(tmp_path / "run", model=base, **VLLM)
    engine = trainer.vllm_generation
    assert isinstance(engine, ThinkingVLLM) and engine.weights().missing
    with pytest.raises(InputError, match="no weights have arrived"):
        engine.generate([[1, 2, 3]], None, 1)
    engine.sync_weights()
    assert len(engine.generate([[1, 2, 3]], None, 1)[1]) == len(engine.states) == 1


@one_family
@pytest.mark.parametrize("options", [{"stop": ["."]}, {"bad_words": ["."]}, {"allowed_token_ids": [1]}], ids=str)
def test_sampling_that_does_not_go_with_forced_thoughts_is_refused_in_training_too(base, tmp_path, options):
    own = {"generation_kwargs": options, "vllm_importance_sampling_correction": False}
    with pytest.raises(InputError, match=f"{next(iter(options))} cannot be combined with forced thoughts"):
        run(tmp_path / "run", base, thoughts=2, **own)
