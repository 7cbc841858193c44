"""vLLM thinks as `generate` does: tokens and states, through chunks, shared prompts, preemption and aborts."""

import os
import random
import subprocess
import sys

import psutil
import pytest
import torch
from engines import NEW, THINKING, assert_same, big_enough, engine, generated, mask_of, plain, thought
from vllm import SamplingParams

from hrpo_patches import replay_forward
from hrpo_patches.models.checkpoint import mark
from hrpo_thinking.errors import InputError
from hrpo_thinking.families import FAMILIES
from hrpo_thinking.request import ThinkingRequest
from hrpo_vllm import take_thoughts

TEXTS = ["Hi", "What is 3 + 4?", "Say #### once, please", "abc" * 12, "one two", "The sea", "12 + 13 =", "Why?"]

WINDOW = {"mistral": {"sliding_window": 16}}  # shorter than a prompt with its completion


def prompts_of(tokenizer, texts=TEXTS):
    return [tokenizer(text)["input_ids"] for text in texts]


def a_marker_said_early_late_and_never(model, tokenizer, prompts):
    """A letter that some completions say in their first fifth, some in their last half, and some do not say."""
    model.config.thinking["answer_start"] = "zzzz"
    tokens = [generated(model, tokenizer, prompt)[0] for prompt in prompts]
    texts = [[tokenizer.decode([one]) for one in row] for row in tokens]
    for letter in sorted({text for row in texts for text in row if len(text) == 1 and text.isascii()}):
        first = [next((i for i, text in enumerate(row) if letter in text), None) for row in texts]
        said = [at for at in first if at is not None]
        if None in first and min(said) < NEW // 5 and max(said) >= NEW // 2:
            return letter
    raise AssertionError("no letter is said early, late and never; take other prompts")


@pytest.fixture(scope="module", params=[kind for kind, family in FAMILIES.items() if family.vllm])
def thinker(request, tokenizer, tmp_path_factory):
    """(model, engine) of a family; the engine's prompts come in chunks of 16 tokens, beside other requests' steps."""
    model = big_enough(request.param, **WINDOW.get(request.param, {}))
    model.config.thinking["answer_start"] = a_marker_said_early_late_and_never(model, tokenizer, prompts_of(tokenizer))
    with engine(model, tokenizer, tmp_path_factory.mktemp("engine"), max_num_batched_tokens=16) as llm:
        yield model, llm


def test_tokens_and_states_are_those_of_generate_with_the_marker_early_late_and_never(thinker, tokenizer):
    model, llm = thinker
    prompts = prompts_of(tokenizer)
    expected = [generated(model, tokenizer, prompt) for prompt in prompts]
    thoughts = {int(one[2].sum()) for one in expected}
    assert NEW in thoughts and min(thoughts) < NEW // 5 and any(NEW // 2 <= n < NEW for n in thoughts)
    for found, one in zip(thought(llm, prompts), expected, strict=True):
        assert_same(found, one)
        assert torch.equal(mask_of(model, tokenizer, found[0]), one[2])


def test_forced_thoughts_come_first_and_think(thinker, tokenizer):
    model, llm = thinker
    (filler,) = tokenizer(".")["input_ids"]
    prompts = prompts_of(tokenizer)
    for prompt, found in zip(prompts, thought(llm, prompts, thoughts=3), strict=True):
        expected = generated(model, tokenizer, prompt, thoughts=3)
        assert_same(found, expected)
        assert found[0][:3] == [filler] * 3 and found[0][3:] != generated(model, tokenizer, prompt)[0][:-3]
        assert torch.equal(mask_of(model, tokenizer, found[0], forced=3), expected[2])


@pytest.mark.parametrize(
    "variant",
    [
        {"projection_layers": 2, "projection_hidden": 48},
        {"projection_norm": True, "residual_scale": "embedding"},
        {"projection_dropout": 0.5},  # of training alone
    ],
    ids=str,
)
def test_every_variant_of_the_projection_is_the_same_in_both(tokenizer, tmp_path, variant):
    model = big_enough("qwen2", thinking=THINKING | variant).eval()
    prompts = prompts_of(tokenizer, TEXTS[:3])
    # A few tokens: a residual as long as an embedding feeds rounding back into a random model, ten times every four.
    expected = [generated(model, tokenizer, prompt, new=6) for prompt in prompts]
    with engine(model, tokenizer, tmp_path) as llm:
        for found, one in zip(thought(llm, prompts, new=6), expected, strict=True):
            assert_same(found, one)


def test_plain_requests_beside_thinking_ones_are_as_without_us(thinker, tokenizer):
    model, llm = thinker
    prompts = prompts_of(tokenizer)
    kinds = [i % 2 == 0 for i in range(len(prompts))]
    each = [
        SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True, extra_args={"thinking": kind})
        for kind in kinds
    ]
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], each, use_tqdm=False)
    for prompt, kind, output in zip(prompts, kinds, outputs, strict=True):
        expected = generated(model, tokenizer, prompt, thinking=kind)[0]
        assert list(output.outputs[0].token_ids) == expected
        assert expected != generated(model, tokenizer, prompt, thinking=not kind)[0]


def test_log_probabilities_of_sampled_tokens_are_the_replays(thinker, tokenizer):
    model, llm = thinker
    prompts = prompts_of(tokenizer)
    for prompt, (tokens, states, logps) in zip(prompts, thought(llm, prompts, temperature=1.0), strict=True):
        mask = mask_of(model, tokenizer, tokens)
        with torch.no_grad():
            ids = torch.tensor([prompt + tokens])
            out = replay_forward(model, ids, thinking_states=states[None], thinking_mask=mask[None])
        replayed = out.logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        mine = replayed.gather(-1, torch.tensor(tokens)[:, None]).squeeze(-1)
        assert (mine - logps).abs().max() < 1e-3
        plainly = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert (plainly.gather(-1, torch.tensor(tokens)[:, None]).squeeze(-1) - logps).abs().max() > 0.05


def crowded(model, tokenizer, folder):
    """An engine whose cache holds fewer requests than it is given, in blocks of 32 tokens, 16 tokens a step."""
    small = {"num_gpu_blocks_override": 12, "block_size": 32, "max_num_batched_tokens": 16}
    return engine(model, tokenizer, folder, **small)


def test_chunks_shared_prompts_and_preemption_at_once_change_nothing_and_lost_thoughts_would(
    tokenizer, tmp_path, monkeypatch
):
    model = big_enough("llama")
    prompts = [ids for ids in prompts_of(tokenizer, TEXTS[:4]) for _ in range(4)]
    expected = {tuple(ids): generated(model, tokenizer, ids) for ids in prompts}
    with crowded(model, tokenizer, tmp_path) as llm:
        for ids, found in zip(prompts, thought(llm, prompts), strict=True):
            assert_same(found, expected[tuple(ids)])
        counts = llm.collective_rpc("thinking_counts")[0]
        assert counts["resumed"] > 0 and counts["replayed"] > 20 and counts["held"] == 0

        monkeypatch.setattr(ThinkingRequest, "thinks_again", lambda self, index: False)
        llm.reset_prefix_cache()
        others = [tokens for tokens, _, _ in thought(llm, prompts)]
        assert any(tokens != expected[tuple(ids)][0] for ids, tokens in zip(prompts, others, strict=True))


def test_no_request_finds_anothers_thoughts_in_the_cache_of_its_prompt(tokenizer, tmp_path, monkeypatch):
    model = big_enough("llama")
    prompts = prompts_of(tokenizer)[:4]
    with engine(model, tokenizer, tmp_path, block_size=32) as llm:
        turns = [ids + tokens for ids, (tokens, _, _) in zip(prompts, thought(llm, prompts), strict=True)]
        for ids, tokens in zip(turns, plain(llm, turns), strict=True):
            assert tokens == generated(model, tokenizer, ids, thinking=False)[0]
        for ids, found in zip(turns, thought(llm, turns), strict=True):  # yesterday's thoughts are today's prompt
            assert_same(found, generated(model, tokenizer, ids))
        for ids, found in zip(prompts, thought(llm, prompts, thoughts=2), strict=True):
            assert_same(found, generated(model, tokenizer, ids, thoughts=2))
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        add, salts = scheduler.add_request, []
        monkeypatch.setattr(scheduler, "add_request", lambda one: (add(one), salts.append(one.cache_salt)))
        thought(llm, prompts)
        for ids, salt in zip(turns, list(salts), strict=True):  # which another user may guess
            given = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True, extra_args={"thinking": False})
            (output,) = llm.generate([{"prompt_token_ids": ids, "cache_salt": salt}], given, use_tqdm=False)
            assert list(output.outputs[0].token_ids) == generated(model, tokenizer, ids, thinking=False)[0]
        monkeypatch.setattr(scheduler, "add_request", type(scheduler).add_request.__get__(scheduler))  # no salt
        llm.reset_prefix_cache()
        thought(llm, prompts)
        wrong = [plain(llm, [ids])[0] != generated(model, tokenizer, ids, thinking=False)[0] for ids in turns]
        assert any(wrong)


def test_thoughts_of_a_running_request_are_not_taken_and_those_of_two_with_one_key_are_both_kept(thinker, tokenizer):
    model, llm = thinker
    prompts = prompts_of(tokenizer)[:3]
    for name, key, prompt, new in zip("abc", ("one", "one", "two"), prompts, (4, 12, 24), strict=True):
        params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, extra_args={"thinking_key": key})
        llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params)
    tokens = {}
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if output.finished:
                tokens[output.request_id] = list(output.outputs[0].token_ids)
        if set(tokens) == {"a", "b"}:
            with pytest.raises(InputError, match="'two' still runs"):
                take_thoughts(llm, ["one", "two"])
    first, then = take_thoughts(llm, ["one"]), take_thoughts(llm, ["one", "two"])
    states = {"a": first["one"], "b": then["one"], "c": then["two"]}
    for name, prompt in zip("abc", prompts, strict=True):
        assert_same((tokens[name], states[name]), generated(model, tokenizer, prompt, new=len(tokens[name])))
    with pytest.raises(InputError, match="nothing was thought under the key 'one'"):
        take_thoughts(llm, ["one"])


def test_thoughts_that_nobody_takes_are_kept_up_to_so_many_bytes(thinker, tokenizer, monkeypatch):
    model, llm = thinker
    prompts = prompts_of(tokenizer)[:4]
    kept = llm.llm_engine.model_executor.driver_worker.worker.thoughts
    monkeypatch.setattr(kept, "bound", 10 * model.config.hidden_size * 4)
    for name, prompt in zip("abcd", prompts, strict=True):
        params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, extra_args={"thinking_key": name})
        llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    for name, prompt in zip("dc", prompts[:1:-1], strict=True):  # the last is known to have ended when it is taken
        expected = generated(model, tokenizer, prompt, new=4)
        assert_same((expected[0], take_thoughts(llm, [name])[name][:4]), expected)
    for lost in "ab":
        with pytest.raises(InputError, match=f"nothing was thought under the key '{lost}', or too much was since"):
            take_thoughts(llm, [lost])


ELSEWHERE = """
import sys
import torch
from vllm import LLM, SamplingParams
from hrpo_thinking.errors import InputError
from hrpo_vllm import take_thoughts
if __name__ == "__main__":
    options = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True, "max_num_seqs": 4}
    llm = LLM(sys.argv[1], kv_cache_memory_bytes=64 << 20, **options)
    assert "hrpo_patches" not in sys.modules
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, extra_args={"thinking_key": "k"})
    (output,) = llm.generate("What is 3 + 4?", params, use_tqdm=False)
    tokens = list(output.outputs[0].token_ids)
    torch.save((tokens, take_thoughts(llm, ["k"])["k"][:12]), sys.argv[2])
    try:
        take_thoughts(llm, ["k"])
    except InputError as error:
        print(error)
"""


def test_thoughts_come_as_tensors_from_an_engine_in_a_process_of_its_own(tokenizer, tmp_path):
    model = big_enough("llama")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    mark(tmp_path)
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    command = [sys.executable, tmp_path / "elsewhere.py", tmp_path, tmp_path / "found"]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "nothing was thought under the key 'k'" in done.stdout, done.stderr[-2000:]
    assert_same(torch.load(tmp_path / "found"), generated(model, tokenizer, prompts_of(tokenizer)[1], new=12))


def test_hundreds_of_requests_of_which_some_are_aborted_leave_nothing_and_the_others_are_right(tokenizer, tmp_path):
    model, rng = big_enough("llama"), random.Random(0)
    prompts = prompts_of(tokenizer)
    expected = [generated(model, tokenizer, ids)[0] for ids in prompts]
    process, memory, right = psutil.Process(), [], 0
    with crowded(model, tokenizer, tmp_path) as llm:
        waiting = [(f"r{i}", i % len(prompts), rng.randrange(4, NEW)) for i in range(300)]
        wanted = {name: (which, new) for name, which, new in waiting}
        running: set[str] = set()
        while waiting or running:
            while waiting and len(running) < 24:
                name, which, new = waiting.pop()
                key = {"thinking_key": name} if rng.random() < 0.1 else {}
                params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, extra_args=key)
                llm.llm_engine.add_request(name, {"prompt_token_ids": prompts[which]}, params)
                running.add(name)
            if rng.random() < 0.2:
                aborted = rng.choice(sorted(running))
                llm.llm_engine.abort_request([aborted])
                running.discard(aborted)
            for output in llm.llm_engine.step():
                if output.finished and output.request_id in running:
                    which, new = wanted[output.request_id]
                    assert list(output.outputs[0].token_ids) == expected[which][:new]
                    running.discard(output.request_id)
                    right += 1
            memory.append(process.memory_info().rss)
        counts = llm.collective_rpc("thinking_counts")[0]
        worker = llm.llm_engine.model_executor.driver_worker.worker
        worker.thoughts._done.clear()  # those with a key that nobody fetched are kept, up to a bound
        plain(llm, prompts[:1])  # a last step, which tells the worker what has ended
        held = llm.collective_rpc("thinking_counts")[0]["held"]
    assert right > 150 and counts["resumed"] > 0 and held == 0
    half = len(memory) // 2
    assert max(memory[half:]) - max(memory[:half]) < 32 << 20, "memory grows"
