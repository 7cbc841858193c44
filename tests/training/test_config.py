"""What HRPOConfig refuses."""

import json
import os
import subprocess
import sys

import pytest
from runs import small_trainer
from tiny import tiny_model

from hrpo_patches import HRPOConfig, ThinkingConfig
from hrpo_thinking.errors import InputError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_vllm": True, "residual": "embedding"}, "vLLM hands over no distribution"),
        ({"use_vllm": True, "vllm_mode": "server"}, "vllm_mode='server' cannot think"),
        (
            {"use_transformers_continuous_batching": True, "residual": "embedding"},
            "hands over no distribution, which the embedding residual is made from",
        ),
        (
            {"use_transformers_continuous_batching": True, "residual": None, "thoughts": 2},
            "only generate supports forced thoughts without thinking",
        ),
        ({"cache_implementation": "paged"}, "cache_implementation='paged' cannot think"),
        ({"generation_kwargs": {"num_beams": 2}}, "num_beams=2 cannot think"),
        ({"residual": "both"}, "residual must be"),
        ({"answer_start": ""}, "answer_start"),
    ],
)
def test_what_cannot_think_is_refused_in_one_sentence(tmp_path, options, message):
    with pytest.raises(InputError, match=message) as error:
        HRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)
    assert "\n" not in str(error.value)


def test_none_is_plain_grpo_and_may_use_what_cannot_think(tmp_path):
    args = HRPOConfig(
        output_dir=str(tmp_path), residual="none", use_cpu=True, bf16=False, generation_kwargs={"num_beams": 2}
    )
    assert args.residual is None


def test_the_defaults_are_the_published_rates(tmp_path):
    args = HRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    assert args.learning_rates == {"gate": 1e-4, "Lambda": 1e-3, "projection": 1e-4}
    assert (args.residual, args.answer_start) == ("projection", "####")


PLAIN = {"use_cpu": True, "bf16": False, "report_to": "none"}


@pytest.mark.parametrize(
    "given",
    [
        ThinkingConfig(residual="projection", r_min=0.5, r_max=0.6, projection_layers=2, thoughts=2),
        {"r_min": 0.5, "r_max": 0.6, "projection_layers": 2, "thoughts": 2},
        '{"r_min": 0.5, "r_max": 0.6, "projection_layers": 2, "thoughts": 2}',
    ],
    ids=["config", "dict", "JSON"],
)
def test_how_a_model_thinks_is_said_at_once_and_reaches_it(tmp_path, given):
    args = HRPOConfig(output_dir=str(tmp_path), thinking=given, **PLAIN)
    assert (args.residual, args.thoughts, args.chosen["projection_layers"]) == ("projection", 2, 2)
    json.dumps(args.to_dict())  # as loggers and checkpoints want it
    trainer = small_trainer(tmp_path / "run", model=tiny_model("llama", thinking=None), thinking=given)
    thinking = ThinkingConfig.of(trainer.model.config)
    assert (thinking.r_min, thinking.projection_layers, thinking.thoughts) == (0.5, 2, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thinking": {"thoughts": 2}, "thoughts": 3}, "thoughts is 3, and thinking says 2"),
        ({"thinking": {"residual": "embedding"}, "residual": None}, "cannot be combined with residual='none'"),
        ({"thinking": {"layers": 2}}, "unknown thinking option 'layers'"),
        ({"thinking": "{"}, "thinking is not valid JSON"),
        ({"thinking": 3}, "must be a ThinkingConfig or a dict"),
        (
            {"thinking": {"residual": "embedding", "projection_layers": 2}},
            "cannot be combined with residual='embedding'",
        ),
    ],
)
def test_what_is_said_in_two_ways_has_to_agree(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        HRPOConfig(output_dir=str(tmp_path), **PLAIN, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_thinking_projection": -1e-4}, "lr_thinking_projection must be at least 0"),
        ({"learning_rate": -1e-4}, "learning_rate must be at least 0"),
        ({"num_iterations": 0}, "num_iterations must be at least 1"),
        ({"max_steps": 0}, "max_steps must be at least 1, or -1"),
        ({"max_completion_length": None}, "max_completion_length must be at least 1, not None"),
    ],
)
def test_values_that_train_nothing_or_are_not_read_are_refused(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        HRPOConfig(output_dir=str(tmp_path), **PLAIN, **options)


def test_generation_options_that_generate_does_not_know_are_refused(tmp_path):
    with pytest.raises(InputError, match="'stop_string' is not an option.*did you mean 'stop_strings'"):
        small_trainer(tmp_path, generation_kwargs={"stop_string": "x"})
    args = HRPOConfig(output_dir=str(tmp_path), use_vllm=True, generation_kwargs={"stop": ["x"]}, **PLAIN)
    args.check_generation_kwargs()  # vLLM's own name


@pytest.mark.parametrize(
    "narrowed",
    [
        {"top_p": 0.95},
        {"top_k": 5},
        {"min_p": 0.1},
        {"repetition_penalty": 1.1},
        {"generation_kwargs": {"presence_penalty": 0.5}},
        {"generation_kwargs": '{"min_tokens": 3}'},
        {"vllm_structured_outputs_regex": "[0-9]+"},
    ],
    ids=str,
)
def test_vllms_log_probabilities_of_a_narrowed_distribution_weigh_no_loss(tmp_path, narrowed):
    own = {"output_dir": str(tmp_path), "use_vllm": True, **PLAIN}
    with pytest.raises(InputError, match="cannot be combined with vLLM's importance sampling correction"):
        HRPOConfig(**own, **narrowed)
    HRPOConfig(**own, **narrowed, vllm_importance_sampling_correction=False)
    HRPOConfig(**own, generation_kwargs={"bad_words": [], "logit_bias": {}})
    HRPOConfig(**own, top_k=-1, top_p=1.0, generation_kwargs={"frequency_penalty": 0.0})


def test_noise_in_the_embeddings_is_refused_where_thoughts_are_made_from_them(tmp_path):
    with pytest.raises(InputError, match="neftune_noise_alpha adds noise"):
        HRPOConfig(output_dir=str(tmp_path), **PLAIN, neftune_noise_alpha=5.0)
    HRPOConfig(output_dir=str(tmp_path), **PLAIN, neftune_noise_alpha=5.0, residual=None)


def test_a_temperature_that_the_loss_does_not_take_is_refused(tmp_path):
    with pytest.raises(InputError, match="temperature=0.5, and the loss takes 1.0"):
        HRPOConfig(output_dir=str(tmp_path), **PLAIN, generation_kwargs={"temperature": 0.5})


def test_of_two_conflicts_the_same_one_is_reported_in_every_process(tmp_path):
    both = {"thinking": {"thoughts": 2, "filler": "~"}, "thoughts": 3, "filler": "!"}
    program = f"import hrpo_patches; hrpo_patches.HRPOConfig('{tmp_path}', use_cpu=True, bf16=False, **{both!r})"
    said = set()
    for seed in ("0", "1"):  # a set of the two names has another order in each
        environment = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        said.add(done.stderr.strip().splitlines()[-1])
    assert len(said) == 1 and "thoughts is 3" in said.pop()
