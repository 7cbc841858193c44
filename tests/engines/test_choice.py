"""The choice of an engine, and an engine from outside."""

from contextlib import nullcontext

import pytest
import torch
from runs import small_trainer
from tiny import byte_tokenizer, tiny_model

from hrpo_patches.engines.base import Completions
from hrpo_patches.engines.batches import Decoding, completions
from hrpo_patches.engines.choice import ENGINES, EngineKind, Needs, choose_engine
from hrpo_thinking.errors import InputError
from hrpo_thinking.inputs import ThinkingInputs


class Echo:
    """An engine that repeats each prompt, and thinks of nothing but zeros while it does."""

    def __init__(self, width):
        self.width = width

    def refresh_weights(self):
        """It has none."""

    def complete(self, prompts, sampling):
        longest = max(map(len, prompts))
        mask = torch.tensor([[i < len(row) for i in range(longest)] for row in prompts])
        states = torch.zeros(len(prompts), longest, self.width)
        return Completions(prompts, None, ThinkingInputs(states, mask, "projection"), torch.ones(mask.shape))


def test_auto_says_which_engine_it_takes_and_why():
    model = tiny_model("llama")
    engine, reason = choose_engine("auto", model, Needs("projection"))
    assert engine == "continuous" and reason.startswith("not vllm: vLLM is not installed")
    for options, why in (
        (("embedding",), "no distribution, which the embedding residual is made from"),
        ((None, 3), "supports forced thoughts without thinking"),
        (("projection", 0, "swapped"), "the control 'swapped' needs the rows"),
    ):
        engine, reason = choose_engine("auto", model, Needs(*options))
        assert engine == "generate" and why in reason
        with pytest.raises(InputError, match="--engine continuous cannot be used"):
            choose_engine("continuous", model, Needs(*options))
    with pytest.raises(InputError, match="--engine vllm cannot be used: vLLM is not installed"):
        choose_engine("vllm", model, Needs("projection"))
    assert choose_engine("generate", model, Needs("projection"))[0] == "generate"


def test_an_engine_from_outside_answers_prompts():
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    echo = Echo(model.config.hidden_size)
    assert completions(model, tokenizer, ["Hi", "abc"], Decoding(8, True), engine=echo) == ["Hi", "abc"]
    with pytest.raises(InputError, match="Echo did not apply the control 'zeroed'"):
        completions(model, tokenizer, ["Hi"], Decoding(8, True, control="zeroed"), engine=echo)
    echo.complete = lambda prompts, sampling: Completions([])
    with pytest.raises(InputError, match="Echo returned 0 completions for 2 prompts"):
        completions(model, tokenizer, ["Hi", "abc"], Decoding(8, True), engine=echo)


def test_an_engine_in_the_table_is_chosen_by_its_name(monkeypatch):
    model = tiny_model("llama")
    start = lambda model, tokenizer, longest, rows: nullcontext(Echo(model.config.hidden_size))  # noqa: E731
    monkeypatch.setitem(ENGINES, "echo", EngineKind(lambda model, needs: None, start))
    assert choose_engine("auto", model, Needs("embedding"))[0] == "echo"
    assert completions(model, byte_tokenizer(), ["Hi"], Decoding(8, True, engine="echo")) == ["Hi"]


def test_a_trainer_takes_its_rollouts_from_the_engine_that_it_is_given(tmp_path, monkeypatch):
    trainer = small_trainer(tmp_path)
    monkeypatch.setattr(trainer, "engine", lambda model: Echo(model.config.hidden_size))
    tokens, logprobs = trainer._think([[1, 2, 3], [4, 5]])
    assert tokens == [[1, 2, 3], [4, 5]] and logprobs is None
    assert trainer._thinking.mask.tolist() == [[True, True, True], [True, True, False]]
    assert not trainer._thinking.states.any()
    monkeypatch.setattr(Echo, "complete", lambda self, prompts, sampling: Completions(prompts))
    with pytest.raises(InputError, match="the engine returned no thinking states"):
        trainer._think([[1, 2, 3]])
