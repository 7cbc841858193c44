"""`--engine vllm` of the commands: evaluations say what `generate` says, and a real model trains on real problems."""

import json
from collections import Counter

import pytest
import torch
from engines import assert_same, big_enough, engine, generated, plain, thought, trained
from rollouts import assert_same_distribution
from runs import assert_smollm2_learns_gsm8k

from hrpo_patches.commands.eval import main as evaluate
from hrpo_patches.engines.batches import Decoding, complete
from hrpo_patches.engines.choice import Needs, choose_engine
from hrpo_patches.models.base import open_model
from hrpo_thinking.errors import InputError

pytestmark = pytest.mark.usefixtures("engines_end")
MARKER = "a"  # which a random model says now and then


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A base model, an adapter trained on it, and problems of several lengths."""
    folder = tmp_path_factory.mktemp("commands")
    trained(folder, tokenizer, answer_start=MARKER)
    rows = [{"question": f"{i}" * (1 + i % 5) + "?", "answer": f"#### {i}"} for i in range(8)]
    (folder / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def said(folder, out, *more):
    data = ["--dataset", str(folder / "problems.jsonl"), "--max_new_tokens", "24", "--batch_size", "5"]
    results = evaluate(["--adapter", str(folder / "adapter"), *data, "--out", str(out), *more])
    return [sample for problem in results["problems"] for sample in problem["samples"]], results["settings"]["engine"]


@pytest.mark.parametrize(
    "more", [[], ["--no-thinking"], ["--thoughts", "3"], ["--thoughts", "3", "--filler", "x"]], ids=str
)
def test_an_evaluation_in_vllm_says_what_generate_says(folder, tmp_path, capfd, more):
    expected, _ = said(folder, tmp_path / "generate.json", *more)
    found, chosen = said(folder, tmp_path / "vllm.json", "--engine", "auto", *more)
    assert chosen == "vllm" and "engine: vllm (the fastest on a CPU)" in capfd.readouterr().out
    assert found == expected and len({sample["completion"] for sample in found}) > 4
    other, _ = said(folder, tmp_path / "other.json", *(["--no-thinking"] if not more else []))
    assert [sample["completion"] for sample in other] != [sample["completion"] for sample in found]


def test_a_sampled_evaluation_that_is_resumed_is_the_whole_one(folder):
    model, tokenizer = open_model(str(folder / "adapter"))
    ids = [tokenizer(text)["input_ids"] for text in ["Hi", "Why?", "abc", "12 + 3", "one", "two"]] * 2
    way = Decoding(16, True, temperature=1.0, batch_size=4, engine="vllm")
    whole = list(complete(model, tokenizer, ids, way))
    assert len(whole) == 3 and list(complete(model, tokenizer, ids, way, first=1)) == whole[1:]
    texts = [tuple(row) for _, rows in whole for row in rows]
    assert len(set(texts)) == len(texts)  # of one prompt, too
    assert list(complete(model, tokenizer, ids, Decoding(**vars(way) | {"seed": 7}))) != whole


def test_a_completion_ends_at_the_end_tokens_that_the_adapter_has(folder):
    model, tokenizer = open_model(str(folder / "adapter"))
    ids = [tokenizer(text)["input_ids"] for text in ("Hi", "Why?")]
    ((_, whole),) = complete(model, tokenizer, ids, Decoding(16, True))
    model.generation_config.eos_token_id = [whole[0][4]]  # as `load_adapter` takes them from the adapter's folder
    expected = list(complete(model, tokenizer, ids, Decoding(16, True)))
    assert len(expected[0][1][0]) <= 5
    assert list(complete(model, tokenizer, ids, Decoding(16, True, engine="vllm"))) == expected


def test_what_vllm_cannot_do_in_an_evaluation_is_said_and_auto_takes_another(folder):
    model, _ = open_model(str(folder / "adapter"))
    for options, why in (
        (("embedding",), "no distribution"),
        ((None, 3), "supports forced thoughts without thinking"),
        (("projection", 0, "zeroed"), "controls change the blend"),
        (("projection", 0, "swapped"), "needs the rows"),
    ):
        with pytest.raises(InputError, match=f"--engine vllm cannot be used: .*{why}"):
            choose_engine("vllm", model, Needs(*options))
        chosen, reason = choose_engine("auto", model, Needs(*options))
        assert chosen == ("continuous" if "zeroed" in options else "generate") and why in reason


def test_a_sequence_that_vllm_has_no_room_for_and_several_processes_are_known_before_it_starts(folder, monkeypatch):
    model, _ = open_model(str(folder / "adapter"))
    room = model.config.max_position_embeddings
    assert choose_engine("auto", model, Needs("projection", longest=room))[0] == "vllm"
    chosen, reason = choose_engine("auto", model, Needs("projection", longest=room + 1))
    assert chosen == "continuous" and f"vLLM holds on to the model's {room} positions" in reason
    with pytest.raises(InputError, match=f"take {room + 1} tokens"):
        choose_engine("vllm", model, Needs("projection", longest=room + 1))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="several processes"):
        choose_engine("vllm", model, Needs("projection"))


def test_an_evaluation_that_is_too_long_for_vllm_is_refused_in_a_sentence(folder, tmp_path):
    with pytest.raises(InputError, match="--engine vllm cannot be used: a prompt and its completion take"):
        said(folder, tmp_path / "out.json", "--engine", "vllm", "--max_new_tokens", "100000")


@pytest.mark.smollm2
def test_a_real_model_thinks_as_in_generate(smollm2, tmp_path):
    real, words = smollm2
    texts = ["The capital of France is", "What is 3 + 4?", "Once upon a time,", "A chair"]
    prompts = [words(text)["input_ids"] for text in texts]
    with engine(real, words, tmp_path, max_num_batched_tokens=16) as llm:
        found = thought(llm, prompts, new=32)
        without = plain(llm, prompts, new=32)
    for one, prompt in zip(found, prompts, strict=True):
        assert_same(one, generated(real, words, prompt, new=32))
    assert without == [generated(real, words, prompt, new=32, thinking=False)[0] for prompt in prompts]
    assert without != [tokens for tokens, *_ in found]


@pytest.mark.smollm2
@pytest.mark.shared_data
def test_a_real_model_trains_on_real_problems(shared_data, tmp_path):
    assert_smollm2_learns_gsm8k("vllm", shared_data, tmp_path / "run")


def test_tokens_are_sampled_from_the_distribution_that_generate_samples_from(tokenizer, tmp_path):
    model = big_enough("llama", thinking={"r_min": 0.3, "r_max": 0.6}, initializer_range=0.1).eval()
    prompt, count = tokenizer("Hi")["input_ids"], 600
    torch.manual_seed(0)
    with engine(model, tokenizer, tmp_path, max_num_seqs=256) as llm:
        sampling = {"temperature": 1.0, "top_k": 4}
        found = Counter(tokens[2] for tokens in plain(llm, [prompt] * count, 3, sampling, thinking=True))
    more = sampling | {"do_sample": True, "max_new_tokens": 3, "pad_token_id": 0}
    out = model.generate(torch.tensor([prompt] * count), tokenizer=tokenizer, thinking=True, **more)
    assert_same_distribution(found, Counter(out[:, len(prompt) + 2].tolist()))
