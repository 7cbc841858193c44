"""Continuous batching thinks as `generate` does: tokens, states and masks, through preemption and shared prompts."""

import asyncio
import gc
import random
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import fields
from functools import partial

import pytest
import torch
from rollouts import alone, assert_same_distribution
from shared_fixtures import every_family
from tiny import tiny_model
from transformers import ContinuousBatchingConfig, GenerationConfig, GPT2Config, GPT2LMHeadModel

from hrpo_patches import replay_forward
from hrpo_patches.engines.batches import Decoding, completions
from hrpo_patches.thinking import continuous
from hrpo_thinking.errors import InputError
from hrpo_thinking.request import ThinkingRequest

THINKING = {"r_min": 0.3, "r_max": 0.6}
TEXTS = ["Hi", "What is 3 + 4?", "Say #### once, please", "abc" * 12, "abc" * 12]
NEW = 20
generated = partial(alone, new=NEW)
NEWER = "page_size" in {field.name for field in fields(ContinuousBatchingConfig)}  # than transformers 5.17


def pages(size, **more):
    """An engine's config with pages of so many tokens, under the name that its version has for it."""
    return ContinuousBatchingConfig(**{"page_size" if NEWER else "block_size": size}, **more)


def options(tokenizer, **more):
    return {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": tokenizer.pad_token_id} | more


def batched(model, tokenizer, prompts, config=None, **more):
    generation = GenerationConfig(**options(tokenizer, eos_token_id=-1))
    config = config or ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64)
    outputs = model.generate_batch(prompts, generation, config, tokenizer=tokenizer, **{"thinking": True} | more)
    assert not [output.error for output in outputs.values() if output.error]
    return list(outputs.values())


def assert_same(output, expected):
    tokens, states, mask, ratio = expected
    assert output.generated_tokens == tokens
    difference = (output.thinking_states - states).norm(dim=-1) / states.norm(dim=-1)
    assert difference.max() < 1e-4
    assert torch.equal(output.thinking_mask, mask) and torch.allclose(output.thinking_ratio, ratio, atol=1e-4)


@pytest.fixture
def family():
    """One is enough where nothing of a family's own code is asked about; where it is, a test names them all."""
    return "llama"


@pytest.fixture
def model(family):
    return tiny_model(family, thinking=THINKING).eval()


def said(model, tokenizer, prompts, late):
    """A letter that one of the model's own completions says for the first time early, or late."""
    found = []
    for prompt in prompts:
        tokens = generated(model, tokenizer, prompt)[0]
        texts = [tokenizer.decode([token]) for token in tokens]
        found += [(i, text) for i, text in enumerate(texts) if text.isascii() and text not in texts[:i]]
    return (max if late else min)(found)[1]


@pytest.mark.parametrize(
    ("family", "when"),
    [("llama", "never"), ("llama", "early"), ("llama", "late"), ("qwen2", "late"), ("qwen3", "early")],
)
def test_tokens_states_and_masks_are_those_of_generate(model, tokenizer, when):
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    model.config.thinking["answer_start"] = (
        "zzzz" if when == "never" else said(model, tokenizer, prompts, when == "late")
    )
    expected = [generated(model, tokenizer, prompt) for prompt in prompts]
    assert all(one[2].all() for one in expected) == (when == "never")
    for output, one in zip(batched(model, tokenizer, prompts), expected, strict=True):
        assert_same(output, one)
        assert output.thinking_residual == "projection"


def test_forced_thoughts_come_first_and_think(model, tokenizer):
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    outputs = batched(model, tokenizer, prompts, thoughts=3)
    (filler,) = tokenizer(".")["input_ids"]
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_same(output, generated(model, tokenizer, prompt, thoughts=3))
        assert output.generated_tokens[:3] == [filler] * 3 and output.thinking_mask[:3].all()


def test_a_request_that_is_preempted_finds_its_thoughts_and_without_them_is_another(model, tokenizer, monkeypatch):
    prompts = [tokenizer(f"{text} {i}")["input_ids"] for i in range(3) for text in TEXTS]
    expected = [generated(model, tokenizer, prompt) for prompt in prompts]
    records = []
    make = ThinkingRequest.__init__
    monkeypatch.setattr(ThinkingRequest, "__init__", lambda self, *args: make(self, *args) or records.append(self))
    small = pages(32, num_blocks=16, max_batch_tokens=40, cpu_offload_space=0)
    for output, one in zip(batched(model, tokenizer, prompts, small), expected, strict=True):
        assert_same(output, one)
    assert sum(record.replayed for record in records) > 0, "no request was preempted"

    read = ThinkingRequest.read

    def forgetful(self, index, token):
        before = len(self.mask)
        return read(self, index, token) and len(self.mask) > before  # a replayed position does not think

    monkeypatch.setattr(ThinkingRequest, "read", forgetful)
    others = batched(model, tokenizer, prompts, small)
    assert any(output.generated_tokens != one[0] for output, one in zip(others, expected, strict=True))


def test_blocks_with_thoughts_are_never_shared(model, tokenizer):
    """A plain request whose prompt is another's prompt and thoughts does not find its keys, nor the other way."""
    prompt = tokenizer("abc" * 12)["input_ids"]
    thought = generated(model, tokenizer, prompt, new=40)[0]
    longer = prompt + thought  # a whole page of it was blended
    plain = generated(model, tokenizer, longer, thinking=False)[0]
    expected = {"u": generated(model, tokenizer, longer), "v": generated(model, tokenizer, prompt)}
    config = pages(8, num_blocks=64, max_batch_tokens=64)
    generation = GenerationConfig(**options(tokenizer, eos_token_id=-1, thinking=True, max_new_tokens=40))
    with (
        continuous.thinking_batches(model, tokenizer),
        model.continuous_batching_context_manager(generation, continuous_batching_config=config) as manager,
    ):
        for request, ids in (("t", prompt), ("p", longer), ("u", longer), ("v", prompt)):
            manager.add_request(ids, request, thinking=request != "p", max_new_tokens=40 if request == "t" else NEW)
            output = manager.get_result(request, timeout=60)
            while not output.is_finished():
                output = manager.get_result(request, timeout=60)
            if request == "t":
                assert output.generated_tokens == thought
            elif request == "p":
                assert output.generated_tokens == plain and not hasattr(output, "thinking_states")
            else:
                assert_same(output, expected[request])
        assert not manager.thinking.records


def test_prompts_are_still_shared(model, tokenizer, monkeypatch):
    prompt = tokenizer("abc" * 20)["input_ids"]
    matched = []
    from transformers.generation.continuous_batching.cache import PagedAttentionCache

    search = PagedAttentionCache.search_prefix_match
    monkeypatch.setattr(
        PagedAttentionCache, "search_prefix_match", lambda *args: matched.append(search(*args)) or matched[-1]
    )
    config = pages(8, num_blocks=64, max_batch_tokens=64)
    outputs = batched(model, tokenizer, [prompt] * 4, config)
    assert max(matched) >= 32 and all(output.generated_tokens == outputs[0].generated_tokens for output in outputs)


@pytest.mark.skipif(not NEWER, reason="transformers 5.17's generate_batch gives one sequence a prompt")
def test_several_sequences_of_a_prompt_have_a_record_each(model, tokenizer):
    prompt = tokenizer("abc" * 5)["input_ids"]
    several = {"do_sample": True, "top_k": 1, "num_return_sequences": 3}  # which is greedy
    generation = GenerationConfig(**options(tokenizer, eos_token_id=-1, **several))
    config = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64)
    outputs = model.generate_batch([prompt], generation, config, tokenizer=tokenizer, thinking=True)
    assert len(outputs) == 3
    for output in outputs.values():
        assert_same(output, generated(model, tokenizer, prompt))


@every_family
def test_plain_batches_are_stocks_and_nothing_is_left_behind(model, tokenizer):
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    before = batched(model, tokenizer, prompts, thinking=None)
    batched(model, tokenizer, prompts)
    after = batched(model, tokenizer, prompts, thinking=None)
    assert [output.generated_tokens for output in before] == [output.generated_tokens for output in after]
    assert not any(hasattr(output, "thinking_states") for output in [*before, *after])
    assert not model._forward_hooks and not model._forward_pre_hooks
    gc.collect()
    assert not [o for o in gc.get_objects() if isinstance(o, ThinkingRequest)]


def test_a_cancelled_request_leaves_nothing(model, tokenizer):
    generation = GenerationConfig(**options(tokenizer, eos_token_id=-1, thinking=True, max_new_tokens=400))
    config = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64)
    with (
        continuous.thinking_batches(model, tokenizer),
        model.continuous_batching_context_manager(generation, continuous_batching_config=config) as manager,
    ):
        for i in range(6):
            manager.add_request([5, 6, 7 + i], f"r{i}", max_new_tokens=400 if i % 2 else 4)
        for i in (1, 3, 5):
            manager.cancel_request(f"r{i}")
        for i in (0, 2, 4):
            assert manager.get_result(f"r{i}", timeout=60).thinking_states.shape[0] == 4
        manager.add_request([5, 6], "last", max_new_tokens=2)
        manager.get_result("last", timeout=60)
        assert not manager.thinking.records


@contextmanager
def managed(model, tokenizer, **more):
    """A manager whose requests think, greedily, unless they are told otherwise."""
    generation = GenerationConfig(**options(tokenizer, eos_token_id=-1, thinking=True) | more)
    config = pages(32, num_blocks=128, max_batch_tokens=64)
    with (
        continuous.thinking_batches(model, tokenizer),
        model.continuous_batching_context_manager(generation, continuous_batching_config=config) as manager,
    ):
        yield manager


def finished(manager, request):
    """What a request ended with; others may end before."""
    start = time.monotonic()
    while time.monotonic() < start + 60:
        output = manager.get_result(request, timeout=1)
        if output is not None and output.is_finished():
            return output
    raise AssertionError(f"{request} did not end")


def dropped(manager, *names):
    """Wait until the engine has dropped requests that were cancelled."""
    for _ in range(2000):
        if not manager.thinking._names & set(names):
            return
        time.sleep(0.005)
    raise AssertionError(f"{names} were not dropped")


def test_a_name_that_is_used_again_thinks_as_its_new_request_asks(model, tokenizer):
    prompt = tokenizer(TEXTS[0])["input_ids"]
    expected, plain = generated(model, tokenizer, prompt), generated(model, tokenizer, prompt, thinking=False)[0]
    with managed(model, tokenizer) as manager:
        manager.add_request(prompt, "a", thinking=False, max_new_tokens=400)
        with pytest.raises(InputError, match="a request 'a' has not ended yet"):
            manager.add_request(prompt, "a")
        manager.cancel_request("a")
        dropped(manager, "a")
        manager.add_request(prompt, "a")
        assert_same(finished(manager, "a"), expected)
        manager.add_request(prompt, "a", thinking=False)
        assert finished(manager, "a").generated_tokens == plain


def test_requests_that_are_cancelled_at_any_time_disturb_no_other(tokenizer):
    model, rng = tiny_model("llama", thinking=THINKING).eval(), random.Random(0)
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS[:4]]
    expected = {(i, t): generated(model, tokenizer, p, thinking=t)[0] for i, p in enumerate(prompts) for t in (0, 1)}
    with managed(model, tokenizer) as manager:
        live, cancelled = {}, []
        for number in range(150):
            which, thinks = live[f"r{number}"] = rng.randrange(4), rng.random() < 0.7
            manager.add_request(prompts[which], f"r{number}", thinking=thinks)
            time.sleep(rng.random() * 0.005)
            if rng.random() < 0.5:
                cancelled.append(rng.choice(sorted(live)))
                manager.cancel_request(cancelled[-1])
                live.pop(cancelled[-1])
            if len(live) > 8:
                name = next(iter(live))
                assert finished(manager, name).generated_tokens == expected[live.pop(name)]
        for name, which in live.items():
            assert finished(manager, name).generated_tokens == expected[which]
        dropped(manager, *cancelled)
        assert len(cancelled) > 50 and not manager.thinking.records and not manager.thinking.plain


def test_handlers_are_given_thoughts_and_a_request_that_failed_leaves_nothing(model, tokenizer):
    prompt, got = tokenizer(TEXTS[1])["input_ids"], []
    expected = generated(model, tokenizer, prompt)

    async def ask(manager):
        ended = asyncio.Event()
        manager.register_result_handler("h", lambda output: (got.append(output), output.is_finished() and ended.set()))
        manager.add_request(prompt, "h", streaming=True)
        await asyncio.wait_for(ended.wait(), 60)

    with managed(model, tokenizer) as manager:
        asyncio.run(ask(manager))
        assert len(got) == NEW
        assert_same(got[-1], expected)
        manager.add_request(prompt, "wrong", top_k="many")  # which the engine finds out
        failed = finished(manager, "wrong")
        assert failed.error and not hasattr(failed, "thinking_states")
        assert not manager.thinking.records and not manager.thinking._names


@pytest.mark.skipif(not NEWER, reason="transformers 5.17 makes one sequence of a request")
def test_sequences_of_a_plain_request_do_not_think_and_those_that_end_at_once_are_right(tokenizer):
    model = tiny_model("llama", thinking=THINKING).eval()
    prompt = tokenizer(TEXTS[1])["input_ids"]
    expected = {thinks: generated(model, tokenizer, prompt, thinking=thinks)[0] for thinks in (False, True)}
    with managed(model, tokenizer, num_return_sequences=3, do_sample=True, top_k=1) as manager:
        for thinks, tokens in expected.items():
            for end in (-1, tokens[0]):
                manager.add_request(prompt, "a", thinking=thinks, eos_token_id=end)
                outputs = [finished(manager, name) for name in ("a", "a__child#0", "a__child#1")]
                assert outputs[0].generated_tokens == (tokens if end < 0 else tokens[:1])
                assert not any(output.error for output in outputs)
                assert all(hasattr(output, "thinking_states") == thinks for output in outputs)
                if end < 0:
                    assert all(output.generated_tokens == tokens for output in outputs)
        assert not manager.thinking.records and not manager.thinking.plain


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"thinking": "maybe"}, "must be True or False, not 'maybe'"),
        ({"thoughts": True}, "must be a whole number from 0, not True"),
        ({"thinking": False, "thoughts": 3}, "only generate supports forced thoughts without thinking"),
        ({"thoughts": NEW}, "thoughts=20 must be smaller than"),
        ({"thoughts": 4, "max_new_tokens": 4}, "thoughts=4 must be smaller than"),
    ],
    ids=str,
)
def test_what_is_asked_of_thinking_has_to_be_possible(tokenizer, asked, message):
    model = tiny_model("llama", thinking=THINKING)
    with pytest.raises(InputError, match=message):
        batched(model, tokenizer, [[5, 6]], **asked)


@pytest.mark.parametrize(
    "sampling",
    [
        *({"num_beams": 2}, {"prompt_lookup_num_tokens": 2}, {"repetition_penalty": 1.5}, {"max_time": 1.0}),
        *({"no_repeat_ngram_size": 2}, {"min_length": 3}, {"min_new_tokens": 3}, {"stop_strings": ["a"]}),
        *({"guidance_scale": 2.0}, {"bad_words_ids": [[5]]}, {"suppress_tokens": [5], "thoughts": 2}),
    ],
    ids=str,
)
def test_sampling_that_the_engine_would_pass_by_is_refused(tokenizer, sampling):
    model = tiny_model("llama", thinking=THINKING)
    config = GenerationConfig(**options(tokenizer, eos_token_id=-1, thinking=True, **sampling))
    with pytest.raises(InputError, match="cannot be followed|num_beams=1|assisted_generation cannot think"):
        model.generate_batch([[5, 6]], config, tokenizer=tokenizer)


def test_sampling_that_says_nothing_passes_and_a_request_needs_room_for_its_own_length(tokenizer):
    model, prompt = tiny_model("llama", thinking=THINKING).eval(), tokenizer("Hi")["input_ids"]
    expected = generated(model, tokenizer, prompt, new=4, thoughts=3)[0]
    nothing = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_new_tokens": 0, "guidance_scale": 1.0}
    with managed(model, tokenizer, thoughts=3, **nothing) as manager:
        with pytest.raises(InputError, match="thoughts=3 must be smaller than"):
            manager.add_request(prompt, "a", max_new_tokens=3)
        manager.add_request(prompt, "a", max_new_tokens=4)
        assert finished(manager, "a").generated_tokens == expected


@pytest.mark.parametrize(
    ("thinking", "config", "message"),
    [
        ({"residual": "embedding"}, {}, "hands over no distribution, which the embedding residual is made from"),
        ({}, {"use_cuda_graph": True}, "use_cuda_graph=True cannot think"),
        ({}, {"use_async_batching": True}, "use_async_batching=True cannot think"),
    ],
)
def test_what_the_engine_cannot_do_is_refused_before_work(tokenizer, thinking, config, message):
    model = tiny_model("llama", thinking=thinking)
    with pytest.raises(InputError, match=message):
        batched(model, tokenizer, [[5, 6]], ContinuousBatchingConfig(**config))
    assert not model._forward_hooks and model.config._attn_implementation == "sdpa"
    with pytest.raises(InputError, match="no token 'nothing like it'"):
        other = tiny_model("llama", thinking={"filler": "nothing like it"})
        batched(other, tokenizer, [[5, 6]], thoughts=2)
    assert other.config._attn_implementation == "sdpa"
    with pytest.raises(InputError, match="needs tokenizer"):
        tiny_model("llama").generate_batch([[5]], thinking=True)
    with pytest.raises(InputError, match="plain one, without thinking modules"):
        tiny_model("llama", thinking=None).generate_batch([[5]], thinking=True, tokenizer=tokenizer)


@every_family
def test_the_engines_log_probabilities_are_the_replays(model, tokenizer):
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    generation = GenerationConfig(**options(tokenizer, do_sample=True, temperature=0.8, top_k=0, eos_token_id=-1))
    config = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64, return_logprobs=True)
    torch.manual_seed(0)
    outputs = model.generate_batch(prompts, generation, config, tokenizer=tokenizer, thinking=True)
    for prompt, output in zip(prompts, outputs.values(), strict=True):
        ids = torch.tensor([prompt + output.generated_tokens])
        states, mask = output.thinking_states[None], output.thinking_mask[None]

        def logps(states, ids=ids, mask=mask):
            out = replay_forward(model, ids, thinking_states=states, thinking_mask=mask)
            logp = (out.logits[0, -NEW - 1 : -1] / 0.8).log_softmax(-1)
            return logp.gather(1, ids[0, -NEW:, None])[:, 0]

        with torch.no_grad():
            sampled = torch.tensor(output.logprobs)
            assert (logps(states) - sampled).abs().max() < 1e-3
            assert (logps(states.roll(1, 1)) - sampled).abs().max() > 1e-2


def test_tokens_are_sampled_from_the_distribution_that_generate_samples_from(tokenizer):
    model = tiny_model("llama", thinking=THINKING, vocab_size=len(tokenizer), initializer_range=0.2).eval()
    prompt, count = tokenizer("Hi")["input_ids"], 600
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 4, "max_new_tokens": 3}
    torch.manual_seed(0)
    config = ContinuousBatchingConfig(num_blocks=256, max_batch_tokens=1200)
    generation = GenerationConfig(**options(tokenizer, eos_token_id=-1, **sampling))
    batch = model.generate_batch([prompt] * count, generation, config, tokenizer=tokenizer, thinking=True)
    ids = torch.tensor([prompt] * count)
    one_by_one = model.generate(ids, tokenizer=tokenizer, thinking=True, **options(tokenizer, **sampling))
    rows = [Counter(output.generated_tokens[2] for output in batch.values())]
    rows.append(Counter(one_by_one[:, len(prompt) + 2].tolist()))
    assert_same_distribution(*rows)


def test_another_family_refuses_to_think_in_batches():
    other = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(InputError, match="continuous batching cannot think"):
        other.generate_batch([[5]], thinking=True)
    with pytest.raises(InputError, match="continuous batching cannot think"):
        other.init_continuous_batching(GenerationConfig(thinking=True, eos_token_id=-1))


@pytest.mark.smollm2
def test_a_real_model_thinks_as_in_generate(smollm2):
    real, words = smollm2
    prompts = [
        words(text)["input_ids"] for text in ("The capital of France is", "What is 3 + 4?", "Once upon a time,")
    ]
    for output, prompt in zip(batched(real, words, prompts, pages(32, num_blocks=64)), prompts, strict=True):
        assert_same(output, generated(real, words, prompt))
    assert real.config._attn_implementation == "sdpa"


@pytest.mark.skipif(not hasattr(ContinuousBatchingConfig(), "auto_switch_to_flash"), reason="it cannot be told not to")
def test_a_float32_model_is_not_switched_to_flash_attention(tokenizer, monkeypatch):
    # As where flash-attn is installed; this transformers then switches the model, whatever its dtype.
    api = pytest.importorskip("transformers.generation.continuous_batching.continuous_api")
    for name, available in (("is_flash_attn_2_available", True), ("is_flash_attn_3_available", False)):
        monkeypatch.setattr(api, name, lambda available=available, **_: available, raising=False)
    model = tiny_model("llama", thinking={"r_min": 0.3, "r_max": 0.6})
    texts = completions(model, tokenizer, ["Hi", "abc"], Decoding(6, True, engine="continuous"))
    assert texts == completions(model, tokenizer, ["Hi", "abc"], Decoding(6, True))
