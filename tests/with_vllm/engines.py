"""Engines of vLLM on tiny models, and what `generate` says to the same prompts."""

import gc
from contextlib import contextmanager
from functools import partial

import torch
from rollouts import alone
from runs import small_trainer
from tiny import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM
from vllm import LLM, SamplingParams

from hrpo_patches.models.checkpoint import mark
from hrpo_thinking.marker import marker_table
from hrpo_thinking.request import ThinkingRequest
from hrpo_vllm import engine_options, take_thoughts

THINKING = {"r_min": 0.5, "r_max": 0.9}
NEW = 40
generated = partial(alone, new=NEW)
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}  # vLLM has no kernel for smaller heads


def big_enough(family, **options):
    """A tiny model whose heads are as wide as vLLM wants them."""
    return tiny_model(family, **SIZES | {"thinking": dict(THINKING)} | options)


def trained(folder, tokenizer, **options):
    """Put a plain base model into `folder`, and an adapter that was trained on it for two steps."""
    big_enough("llama", thinking=None).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", thinking={"r_min": 0.3, "r_max": 0.6})
    trainer = small_trainer(folder / "adapter", model=model, max_steps=2, **options)
    trainer.train()
    trainer.save_model()


@contextmanager
def engine(model, tokenizer, folder, **options):
    """An engine on this model; what it held is gone afterwards."""
    if not (folder / "config.json").is_file():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if model.config.thinking:
            mark(folder)
    own = engine_options(AutoConfig.from_pretrained(folder)) if model.config.thinking else {}
    given = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True, "max_num_seqs": 16, "seed": 0}
    given["kv_cache_memory_bytes"] = 64 << 20
    llm = LLM(str(folder), **given | own | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def thought(llm, prompts, new=NEW, **extra):
    """[(tokens, states, log-probabilities)] of thinking completions, greedy unless `extra` is told otherwise."""
    sampling = {"temperature": extra.pop("temperature", 0.0)}
    keys = [f"request {i}" for i in range(len(prompts))]
    each = [
        SamplingParams(
            max_tokens=new, ignore_eos=True, logprobs=0, extra_args={"thinking_key": key} | extra, **sampling
        )
        for key in keys
    ]
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], each, use_tqdm=False)
    states = take_thoughts(llm, keys)
    found = []
    for key, output in zip(keys, outputs, strict=True):
        tokens = list(output.outputs[0].token_ids)
        logps = [step[token].logprob for step, token in zip(output.outputs[0].logprobs, tokens, strict=True)]
        found.append((tokens, states[key][: len(tokens)], torch.tensor(logps)))
    return found


def plain(llm, prompts, new=NEW, sampling=None, **extra_args):
    """The tokens of completions, by default greedy and not thinking."""
    sampling = {"temperature": 0.0, "max_tokens": new, "ignore_eos": True} | (sampling or {})
    given = SamplingParams(**sampling, extra_args={"thinking": False} | extra_args)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], given, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def mask_of(model, tokenizer, tokens, forced=0):
    """Which of a completion's tokens think, by the record that engines keep."""
    table = marker_table(tokenizer, model.config.thinking["answer_start"], model.config.vocab_size)
    record = ThinkingRequest(table.numpy(), forced)
    return torch.tensor([record.read(i, token) for i, token in enumerate(tokens)])


def assert_same(found, expected):
    """Same tokens, and states within 1e-4 of each other, relative to their size."""
    assert found[0] == expected[0]
    difference = (found[1] - expected[1]).norm(dim=-1) / expected[1].norm(dim=-1)
    assert difference.max() < 1e-4, difference.max()
