"""Answers in batches of similar length, which change no answer and can be skipped."""

import pytest
import torch
from tiny import byte_tokenizer, tiny_model

from hrpo_patches.engines.base import sampling_of
from hrpo_patches.engines.batches import Decoding, batches_of, complete, completions
from hrpo_patches.engines.continuous import ContinuousEngine
from hrpo_patches.engines.generate import GenerateEngine
from hrpo_patches.tasks.prompts import uses_chat
from hrpo_thinking.errors import InputError

ENGINES = ("generate", "continuous")


def test_batches_sorted_by_length_change_no_answer():
    model, tokenizer = tiny_model("llama", thinking={"r_min": 0.5, "r_max": 0.9}), byte_tokenizer()
    prompts = ["What is 3 + 4?", "Hi", "abc", "Say #### once", "x"]
    model.train()
    alone = [completions(model, tokenizer, [p], Decoding(8, True))[0] for p in prompts]
    assert completions(model, tokenizer, prompts, Decoding(8, True, batch_size=2)) == alone
    assert completions(model, tokenizer, prompts, Decoding(8, False)) != alone
    assert model.training and torch.is_grad_enabled()


def test_completions_come_in_batches_and_end_at_their_end_token():
    model, tokenizer = tiny_model("llama", thinking=False), byte_tokenizer()
    ids = [[1] * length for length in (5, 2, 9, 2)]
    model.generation_config.eos_token_id = ends = list(range(60))
    decoding = Decoding(30, thinking=False, temperature=1.0, batch_size=3)
    found = {}
    for batch, rows in complete(model, tokenizer, ids, decoding):
        found |= dict(zip(batch, rows, strict=True))
    assert batches_of(ids, 3) == [[1, 3, 0], [2]] and sorted(found) == [0, 1, 2, 3]
    for row in found.values():
        assert not set(ends) & set(row[:-1]) and (len(row) == 30 or row[-1] in ends)
    assert any(len(row) < 30 for row in found.values())
    same = [row for _, rows in complete(model, tokenizer, [[1, 2]] * 6, decoding) for row in rows]
    assert same[:3] != same[3:]  # batches do not share a seed
    ((batch, rows),) = complete(model, tokenizer, ids, decoding, first=1)
    assert batch == [2] and rows == [found[2]]  # the same, though the first batch was skipped


def test_a_control_is_off_while_the_caller_has_a_batch():
    model, tokenizer = tiny_model("llama", thinking={"r_min": 0.5, "r_max": 0.9}), byte_tokenizer()
    plain = completions(model, tokenizer, ["Hi"], Decoding(8, True))
    between = []
    for _ in complete(model, tokenizer, [[1, 2], [3]], Decoding(8, True, batch_size=1, control="zeroed")):
        between.append(completions(model, tokenizer, ["Hi"], Decoding(8, True)))
    assert (
        between == [plain, plain] != [completions(model, tokenizer, ["Hi"], Decoding(8, True, control="zeroed"))] * 2
    )


def test_an_engine_of_another_name_is_refused():
    with pytest.raises(InputError, match="engine must be one of generate, continuous, vllm, not 'auto'"):
        Decoding(8, True, engine="auto")


def test_a_conversation_needs_a_template():
    tokenizer = byte_tokenizer()
    assert not uses_chat("auto", tokenizer) and not uses_chat("plain", tokenizer)
    with pytest.raises(InputError, match="needs a chat template"):
        uses_chat("chat", tokenizer)
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert uses_chat("auto", tokenizer) and not uses_chat("plain", tokenizer)


def test_continuous_batching_gives_generates_greedy_completions(tokenizer):
    model = tiny_model("llama", thinking={"r_min": 0.3, "r_max": 0.6})
    prompts = ["Hi", "What is 3 + 4?", "abc"]
    for thinking, thoughts in ((True, 0), (True, 2), (False, 0)):
        ways = [Decoding(12, thinking, batch_size=2, thoughts=thoughts, engine=engine) for engine in ENGINES]
        one, other = (completions(model, tokenizer, prompts, way) for way in ways)
        assert one == other
    for control in ("zeroed", "off", "token"):
        ways = [Decoding(12, True, control=control, engine=engine) for engine in ENGINES]
        one, other = (completions(model, tokenizer, prompts, way) for way in ways)
        assert one == other


@pytest.mark.parametrize(
    "said",
    [
        {"suppress_tokens": list(range(40, 100))},
        {"bad_words_ids": [[i] for i in range(40, 100)]},
        {"min_new_tokens": 12, "eos_token_id": list(range(0, 268, 3))},
        {"forced_eos_token_id": 7, "repetition_penalty": 1.5, "num_beams": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_models_own_wishes_for_decoding_change_no_answer_but_its_ends_do(tokenizer, engine, said):
    model, way = tiny_model("llama", thinking={"r_min": 0.3, "r_max": 0.6}), Decoding(12, True, engine=engine)
    prompts = ["Hi", "What is 3 + 4?", "abc"]
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = said.get("eos_token_id", before)
    expected = completions(model, tokenizer, prompts, Decoding(12, True))
    model.generation_config.update(**said)
    own = model.generation_config
    assert completions(model, tokenizer, prompts, way) == expected
    assert model.generation_config is own
    if "eos_token_id" in said:
        model.generation_config.eos_token_id = before
        assert completions(model, tokenizer, prompts, way) != expected


@pytest.mark.parametrize("engine", ENGINES)
def test_the_tokenizers_end_token_ends_a_completion_as_in_training(tokenizer, engine):
    model, way = tiny_model("llama", thinking={"r_min": 0.3, "r_max": 0.6}), Decoding(12, True, engine=engine)
    model.generation_config.eos_token_id = None
    prompt, other = tokenizer("Hi")["input_ids"], byte_tokenizer()
    ((_, (whole,)),) = complete(model, tokenizer, [prompt], way)
    other.eos_token = other.convert_ids_to_tokens(whole[4])
    ((_, (cut,)),) = complete(model, other, [prompt], way)
    assert cut == whole[: whole.index(whole[4]) + 1] and len(whole) == 12


@pytest.mark.parametrize("kind", [GenerateEngine, ContinuousEngine])
def test_an_engine_refuses_empty_prompts_and_returns_thoughts_only_of_what_thought(tokenizer, kind):
    model = tiny_model("llama", thinking={"r_min": 0.3, "r_max": 0.6})
    engine, prompts = kind(model, tokenizer), [[5, 6, 7], [8]]
    for wrong in ([], [[], [1]], [[1], []]):
        with pytest.raises(InputError, match="every prompt must have a token"):
            engine.complete(wrong, sampling_of(model, tokenizer, 4, True))
    for thinking in (False, True):
        sampling = sampling_of(model, tokenizer, 4, thinking)
        tokens = engine.complete(prompts, sampling).tokens
        sampling.return_dict_in_generate = True
        found = engine.complete(prompts, sampling)
        assert found.tokens == tokens and (found.thinking is not None) == thinking
    sampling = sampling_of(model, tokenizer, 4, False)
    sampling.eos_token_id = tokens = engine.complete(prompts, sampling).tokens[0][1]  # one id, not a list
    assert engine.complete(prompts, sampling).tokens[0][-1] == tokens
