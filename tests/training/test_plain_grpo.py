"""`residual=None` is TRL's own GRPO: other families, mixtures of experts and tools, digit for digit."""

from importlib.resources import files

import pytest
import torch
from datasets import Dataset
from packaging.version import Version
from runs import DEFAULTS, lengths_differ
from tiny import byte_tokenizer, tiny_config, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl import __version__ as trl_version

from hrpo_patches import HRPOConfig, HRPOTrainer

STEPS = 7
TEXTS = ["Hi", "What is 3 + 4?", "abc", "Say #### once"]
OLD = Version(trl_version) < Version("1.16")  # whose GRPOTrainer needs a GPU
CALL = '<tool_call>\n{"name": "double", "arguments": {"number": 3}}\n</tool_call>'
KEPT = (
    "loss",
    "reward",
    "reward_std",
    "grad_norm",
    "entropy",
    "aux_loss",
    "completions/mean_length",
    "tools/call_frequency",
)


def mixture():
    plain = tiny_config("llama", thinking=None)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "eos_token_id", "pad_token_id")
    shared = {name: getattr(plain, name) for name in names}
    experts = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**shared, **experts, bos_token_id=None, initializer_range=0.3))


def gpt2():
    size = len(byte_tokenizer())
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
    return GPT2LMHeadModel(GPT2Config(vocab_size=size, eos_token_id=size - 2, bos_token_id=None, **shape))


def double(number: int) -> int:
    """Twice a number.

    Args:
        number: the number.

    Returns:
        Twice that.
    """
    CALLS.append(number)
    return 2 * number


CALLS: list[int] = []


def trained(kind, folder, model, tokenizer, prompts, options, **extra):
    """What three steps log, and the weights after them."""
    options = DEFAULTS | {"output_dir": str(folder), "max_steps": STEPS, "beta": 0.0} | options
    own = {"residual": "none", "monitor": False} if kind is HRPOTrainer else {}
    arguments = (HRPOConfig if kind is HRPOTrainer else GRPOConfig)(**options, **own)
    data = Dataset.from_dict({"prompt": prompts})  # of four, two steps an epoch: the third is another epoch's
    trainer = kind(model, lengths_differ, arguments, data, processing_class=tokenizer, **extra)
    trainer.train()
    log = [{k: row[k] for k in KEPT if k in row} for row in trainer.state.log_history if "loss" in row]
    return log, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_same(tmp_path, model, prompts, options, tokenizer=byte_tokenizer, **extra):
    kinds = (HRPOTrainer,) if OLD else (HRPOTrainer, GRPOTrainer)
    runs = [trained(kind, tmp_path / kind.__name__, model(), tokenizer(), prompts, options, **extra) for kind in kinds]
    assert len(runs[0][0]) == STEPS and runs[0][0][0]["grad_norm"] > 0
    for log, weights in runs[1:]:
        assert log == runs[0][0]
        assert all(torch.equal(value, weights[name]) for name, value in runs[0][1].items())
    return runs[0][0]


@pytest.mark.parametrize("model", [gpt2, lambda: tiny_model("llama", thinking=None)], ids=["gpt2", "llama"])
def test_plain_grpo_is_trls_digit_for_digit(tmp_path, model):
    assert_same(tmp_path, model, TEXTS, {})


def test_what_trl_takes_by_position_is_taken(tmp_path):
    data = Dataset.from_dict({"prompt": ["Hi"] * 8})
    options = DEFAULTS | {"output_dir": str(tmp_path), "residual": "none", "beta": 0.0}
    model, tokenizer = tiny_model("llama", thinking=None), byte_tokenizer()
    trainer = HRPOTrainer(model, lengths_differ, HRPOConfig(**options), data, data, tokenizer)
    assert trainer.eval_dataset is not None and trainer.processing_class is tokenizer


@pytest.mark.skipif(OLD, reason="TRL 1.15 has no scores for a mixture of experts on a CPU")
def test_a_mixture_of_experts_trains_its_router_as_in_trl(tmp_path):
    log = assert_same(tmp_path, mixture, TEXTS, {})
    assert all(row["aux_loss"] > 0 for row in log)


@pytest.mark.skipif(OLD, reason="TRL 1.15 does not run on a CPU")
def test_a_run_that_calls_a_tool_is_trls(tmp_path):
    def tokenizer():
        plain = byte_tokenizer()
        plain.add_tokens([CALL])
        plain.chat_template = files("trl").joinpath("chat_templates/qwen3.jinja").read_text()
        return plain

    def model():
        return tiny_model("qwen2", thinking=None, vocab_size=len(tokenizer()), max_position_embeddings=4096)

    call = len(byte_tokenizer())
    options = {"generation_kwargs": {"sequence_bias": [[[call], 6.0]]}, "max_tool_calling_iterations": 1}
    CALLS.clear()
    prompts = [[{"role": "user", "content": text}] for text in TEXTS]

    assert_same(tmp_path, model, prompts, options, tokenizer, tools=[double])
    assert CALLS and set(CALLS) == {3}
