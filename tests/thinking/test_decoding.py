"""Thinking in `generate`: the path is taken, it does not depend on how decoding is done, and misuse is refused."""

import functools
import warnings
from types import SimpleNamespace

import pytest
import torch
from rollouts import TEMPERATURE, bias, completions, ragged, real_tokens, sample, sampled_logps
from tiny import byte_tokenizer, tiny_config, tiny_model
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, StoppingCriteriaList
from transformers.modeling_outputs import CausalLMOutputWithPast

from hrpo_patches import replay_forward
from hrpo_patches.thinking.decoding import ForcedThoughts, ThinkingDecoder, start_thinking
from hrpo_thinking.errors import InputError
from hrpo_thinking.inputs import ThinkingInputs
from hrpo_thinking.parts import embedding_residual

BOLD = {"r_min": 0.5, "r_max": 0.9}  # a start that is not smooth, so that thinking shows


def think(model, tokenizer, inputs, **options):
    arguments = {"do_sample": False, "max_new_tokens": 12, "return_dict_in_generate": True} | options
    return model.generate(**inputs, tokenizer=tokenizer, thinking=True, **arguments)


def without_hidden_state(model):
    """The model, with a forward that hands no hidden state over, as a wrapper's might."""
    forward = model.forward

    @functools.wraps(forward)  # generate reads the signature
    def bare(*args, **kwargs):
        out = forward(*args, **kwargs)
        return CausalLMOutputWithPast(loss=out.loss, logits=out.logits, past_key_values=out.past_key_values)

    model.forward = bare
    return model


def test_another_projection_gives_other_logits(family, tokenizer):
    model, inputs = tiny_model(family, thinking=BOLD), ragged(tokenizer)
    before = think(model, tokenizer, inputs, output_logits=True)
    model.model.thinking_projection.weight.data = torch.randn(32, 32)
    after = think(model, tokenizer, inputs, output_logits=True)
    assert before.thinking_residual == after.thinking_residual == "projection"
    assert torch.equal(before.logits[0], after.logits[0])  # no thinking token has been read yet
    assert (before.logits[1] - after.logits[1]).abs().max() > 1e-3


def test_thinking_is_not_the_plain_completion_and_asking_for_none_is(family, tokenizer):
    model, inputs = tiny_model(family, thinking=BOLD), ragged(tokenizer)
    plain = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    assert torch.equal(plain, model.generate(**inputs, do_sample=False, max_new_tokens=12, thinking=False))
    assert not torch.equal(plain, think(model, tokenizer, inputs).sequences)


def test_the_embedding_residual_is_made_from_the_processed_distribution(family, tokenizer):
    model, inputs = tiny_model(family, thinking={"residual": "embedding"}), ragged(tokenizer)
    out = sample(model, tokenizer, inputs, top_k=5)
    p = torch.stack(out.scores, 1).softmax(-1)
    assert (p > 0).sum(-1).max() == 5
    torch.testing.assert_close(out.thinking_states, embedding_residual(p, model.model.embed_tokens.weight))


def test_undone_steps_are_forgotten(tokenizer):
    model = tiny_model("llama")
    decoder = ThinkingDecoder(model, torch.zeros(1, 2, dtype=torch.long), tokenizer, record=True)
    decoder.states, decoder.masks = [torch.full((1, 32), float(i)) for i in range(3)], [torch.ones(1) == 1] * 3
    decoder.real = [torch.ones(1, dtype=torch.long)] * 3
    decoder.undo(0)
    decoder.undo(1)
    out = decoder.outputs(torch.zeros(1, 4, dtype=torch.long))
    assert out["thinking_states"][0, :, 0].tolist() == [0, 1] and out["thinking_mask"].shape == (1, 2)
    assert out["attention_mask"].tolist() == [[1] * 4]


def test_a_hidden_state_that_comes_and_goes_is_an_error(tokenizer):
    decoder = ThinkingDecoder(tiny_model("llama"), torch.zeros(1, 2, dtype=torch.long), tokenizer, record=False)
    arguments = torch.zeros(1, len(tokenizer)), torch.zeros(1, dtype=torch.long), torch.ones(1)
    for _ in range(3):
        decoder.observe(SimpleNamespace(last_hidden_state=torch.randn(1, 1, 32)), *arguments)
        assert len(decoder.states) == len(decoder.masks) == 1  # nothing is kept that nobody asked for
    with pytest.raises(RuntimeError, match="in some decoding steps and none in others"):
        decoder.observe(SimpleNamespace(), *arguments)


def test_the_outputs_belong_to_the_completion_tokens(family, tokenizer):
    model, inputs = tiny_model(family), ragged(tokenizer)
    out = sample(model, tokenizer, inputs, seed=1, num_return_sequences=4)
    tokens = completions(out, inputs)
    assert out.thinking_states.shape == (*tokens.shape, 32)
    assert out.thinking_mask.shape == out.thinking_ratio.shape == tokens.shape
    a = model.model.thinking_decay(model.model.embed_tokens(tokens)).mean(-1)
    torch.testing.assert_close(out.thinking_ratio, torch.where(out.thinking_mask, a, 1.0))
    first = model(inputs["input_ids"][:1], inputs["attention_mask"][:1], output_last_hidden_state=True)
    torch.testing.assert_close(out.thinking_states[0, 0], first.last_hidden_state[0, -1])


@pytest.mark.parametrize(
    ("family", "residual"),
    [("llama", "projection"), ("llama", "embedding"), ("qwen2", "projection"), ("qwen3", "embedding")],
)
@pytest.mark.parametrize(
    "options", [{"cache_implementation": "static"}, {"use_cache": False}, {"prefill_chunk_size": 4}]
)
def test_the_kind_of_cache_does_not_matter(family, tokenizer, residual, options):
    # Each decode is held against one forward over its own tokens and states: from one to the other, rounding grows.
    model = tiny_model(family, thinking=BOLD | {"residual": residual})
    inputs = ragged(tokenizer)
    for out in (think(model, tokenizer, inputs), think(model, tokenizer, inputs, **options)):
        tokens = completions(out, inputs)
        replay = model(
            out.sequences,
            torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], 1),
            thinking_inputs=ThinkingInputs(out.thinking_states, out.thinking_mask),
            output_last_hidden_state=True,
        )
        before = slice(-tokens.shape[1] - 1, -1)
        logits = replay.logits[:, before]
        states = replay.last_hidden_state[:, before]
        if residual == "embedding":
            states = embedding_residual(logits.softmax(-1), model.get_input_embeddings().weight)
        real = real_tokens(model, tokens)
        assert (logits.max(-1).values - logits.gather(-1, tokens[..., None])[..., 0])[real].max() < 1e-4
        assert (out.thinking_states - states)[real].abs().max() < 1e-4 < 1e-2 < states.std()
        assert out.thinking_mask[:, 0].all()


def test_padding_and_neighbours_do_not_change_a_completion(family, tokenizer):
    model, prompts = tiny_model(family, thinking=BOLD), ["Hi", "What is 3 + 4?", "abc"]
    together = think(model, tokenizer, ragged(tokenizer, prompts))
    for row, prompt in enumerate(prompts):
        alone = think(model, tokenizer, ragged(tokenizer, [prompt]))
        tokens = completions(alone, ragged(tokenizer, [prompt]))[0]
        assert torch.equal(together.sequences[row, -12:][: len(tokens)], tokens)


def test_plain_ids_are_returned_when_no_dict_is_asked_for(family, tokenizer):
    model, inputs = tiny_model(family, thinking=BOLD), ragged(tokenizer)
    for cache in (True, False):
        ids = think(model, tokenizer, inputs, return_dict_in_generate=False, use_cache=cache)
        assert torch.equal(ids, think(model, tokenizer, inputs).sequences)


def test_a_streamer_sees_every_token(tokenizer):
    model, inputs, seen = tiny_model("llama", thinking=BOLD), ragged(tokenizer, ["Hi"]), []
    streamer = SimpleNamespace(put=lambda ids: seen.extend(ids.flatten().tolist()), end=lambda: seen.append(None))
    out = think(model, tokenizer, inputs, streamer=streamer)
    assert seen == [*out.sequences[0].tolist(), None]


def test_sampling_draws_the_same_random_numbers_as_without_thinking(tokenizer):
    model, inputs = tiny_model("llama"), ragged(tokenizer)
    torch.manual_seed(0)
    think(model, tokenizer, inputs, do_sample=True)
    after = torch.rand(1)
    torch.manual_seed(0)
    model.generate(**inputs, do_sample=True, max_new_tokens=12)
    assert torch.equal(after, torch.rand(1))


def test_generation_config_can_ask_for_thinking_and_keeps_it(tokenizer, tmp_path):
    model, inputs = tiny_model("llama", thinking=BOLD), ragged(tokenizer)
    GenerationConfig(thinking=True, max_new_tokens=12).save_pretrained(tmp_path)
    loaded = GenerationConfig.from_pretrained(tmp_path)
    assert loaded.thinking is True
    out = model.generate(**inputs, tokenizer=tokenizer, generation_config=loaded)
    assert torch.equal(out, think(model, tokenizer, inputs).sequences)


def test_a_forward_without_hidden_state_falls_back_once_and_says_so(family, tokenizer):
    inputs = ragged(tokenizer)
    expected = think(tiny_model(family, thinking=BOLD | {"residual": "embedding"}), tokenizer, inputs)
    model = without_hidden_state(tiny_model(family, thinking=BOLD))
    with pytest.warns(UserWarning, match="no last_hidden_state") as caught:
        out = think(model, tokenizer, inputs)
    assert len([w for w in caught if "last_hidden_state" in str(w.message)]) == 1
    assert out.thinking_residual == expected.thinking_residual == "embedding"
    assert torch.equal(out.sequences, expected.sequences)
    assert torch.equal(out.thinking_states, expected.thinking_states)


def test_a_forward_with_hidden_state_gives_no_warning(family, tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        think(tiny_model(family), tokenizer, ragged(tokenizer))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "num_beams=1"),
        ({"tokenizer": None}, "needs tokenizer"),
        ({"thinking": "yes"}, "True or False"),
        ({"custom_generate": lambda *args, **kwargs: None}, "custom_generate cannot think"),
        ({"prompt_lookup_num_tokens": 3}, "assisted_generation cannot think"),
        ({"cache_implementation": "paged"}, "hands no thoughts over; call generate_batch"),
    ],
)
def test_what_cannot_think_is_refused_in_one_sentence(tokenizer, options, message):
    inputs = ragged(tokenizer, ["Hi"])
    arguments = {"tokenizer": tokenizer, "thinking": True, "max_new_tokens": 3} | options
    with pytest.raises(InputError, match=message):
        tiny_model("llama").generate(inputs["input_ids"], **arguments)


def test_a_model_without_thinking_modules_refuses_to_think(tokenizer):
    inputs = ragged(tokenizer, ["Hi"])
    with pytest.raises(InputError, match="without thinking modules"):
        think(tiny_model("llama", thinking=False), tokenizer, inputs)
    other = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(InputError, match="GPT2LMHeadModel cannot think: .* patches for Llama, "):
        think(other, tokenizer, inputs)


def test_a_marker_that_cannot_be_spelled_is_refused_before_decoding():
    from tiny import byte_tokenizer

    tokenizer = byte_tokenizer()
    model = tiny_model("llama", thinking={"answer_start": "####"})
    tokenizer.get_vocab = lambda: {"a": 0, "b": 1, "e": 2, "d": 3, "c": 4, "f": 5}
    with pytest.raises(InputError, match="answer marker"):
        think(model, tokenizer, {"input_ids": torch.zeros(1, 2, dtype=torch.long)})


def test_a_model_config_never_asks_generate_to_think():
    assert GenerationConfig.from_model_config(tiny_config("llama", thinking=BOLD)).thinking is None


def test_forced_thoughts_think_and_are_no_text_of_the_marker(family, tokenizer):
    model = tiny_model(family, thinking=BOLD | {"answer_start": "####", "filler": "##"})
    inputs = ragged(tokenizer)
    out = model.generate(
        **inputs,
        tokenizer=tokenizer,
        thinking=True,
        thoughts=1,
        max_new_tokens=10,
        do_sample=False,
        return_dict_in_generate=True,
        sequence_bias={(tokenizer.get_vocab()["##"],): 30.0},
    )
    tokens = out.sequences[:, -10:]
    assert (tokens == tokenizer.get_vocab()["##"]).all() and real_tokens(model, tokens).all()
    assert out.thinking_mask.tolist() == [[True, True] + [False] * (10 - 2)] * len(tokens)  # ## and #### of text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thoughts": -1}, "whole number from 0, not -1"),
        ({"thoughts": 1.5}, "whole number from 0"),
        ({"thoughts": 4}, "thoughts=4 must be smaller than max_new_tokens=4"),
        ({"thoughts": 2, "num_beams": 2}, "num_beams"),
        ({"thoughts": 2, "tokenizer": None}, "which token is the filler"),
    ],
)
def test_generate_refuses_forced_thoughts_that_cannot_be(options, message, tokenizer):
    model = tiny_model("llama")
    with pytest.raises(InputError, match=message):
        model.generate(**ragged(tokenizer), **{"tokenizer": tokenizer, "max_new_tokens": 4} | options)


def test_stop_strings_do_not_see_the_fillers(family, tokenizer):
    model, inputs = tiny_model(family, thinking=BOLD), ragged(tokenizer)
    options = {"do_sample": False, "max_new_tokens": 8, "thoughts": 3, "tokenizer": tokenizer}
    free = model.generate(**inputs, thinking=True, **options)
    stopped = model.generate(**inputs, thinking=True, stop_strings=["..", "."], **options)
    assert torch.equal(stopped[:, : free.shape[1]], free[:, : stopped.shape[1]])
    biased = {(tokenizer.get_vocab()["."],): 50.0}
    for stop, length in ((".", 1), ("...", 3)):  # after so many dots of its own, of which it says nothing else
        out = model.generate(**inputs, thinking=True, stop_strings=[stop], sequence_bias=biased, **options)
        assert out.shape[1] - inputs["input_ids"].shape[1] == 3 + length


def test_a_filler_that_ends_a_completion_or_is_no_token_is_refused(tokenizer):
    model, inputs = tiny_model("llama"), ragged(tokenizer)
    for filler in (99999, -1):
        with pytest.raises(InputError, match="must be the id of one of the model's tokens"):
            model.generate(**inputs, thoughts=1, max_new_tokens=4, filler_token_id=filler)
    model.generation_config.eos_token_id = [5, tokenizer.get_vocab()["."]]
    with pytest.raises(InputError, match="ends a completion"):
        model.generate(**inputs, thoughts=1, max_new_tokens=4, tokenizer=tokenizer)


def test_steps_that_are_undone_are_no_steps_of_the_fillers(tokenizer):
    model, inputs = tiny_model("llama"), ragged(tokenizer)
    decoder = ThinkingDecoder(model, inputs["input_ids"], tokenizer, True)
    decoder.forced = ForcedThoughts(2, 7)
    with torch.no_grad():
        outputs = model(**inputs, output_last_hidden_state=True)
    tokens = torch.full((len(inputs["input_ids"]),), 11)
    seen = [decoder.observe(outputs, outputs.logits[:, -1], tokens, tokens > 0)[0].item() for _ in range(3)]
    decoder.undo(2)
    seen += [decoder.observe(outputs, outputs.logits[:, -1], tokens, tokens > 0)[0].item() for _ in range(2)]
    assert seen == [7, 7, 11, 7, 11] and len(decoder.states) == 3


@pytest.mark.parametrize("longest", [None, 1])
def test_a_plain_generation_is_asked_nothing_about_the_room_for_thoughts(tokenizer, longest):
    model, inputs = tiny_model("llama"), ragged(tokenizer)
    plain = GenerationConfig(max_length=longest)
    assert start_thinking(model, inputs["input_ids"], plain, {}, StoppingCriteriaList()) is None


@pytest.mark.parametrize("pad", ["own", "end"])
def test_the_attention_mask_of_a_generation_is_that_of_an_exact_replay(family, pad):
    tokenizer = byte_tokenizer()
    model = tiny_model(family, thinking=BOLD)
    if pad == "end":
        tokenizer.pad_token = tokenizer.eos_token
    inputs = ragged(tokenizer, ("Hi<end>", "What<end> is 3 + 4?", "abc"))  # as a chat template ends its turns
    out = sample(model, tokenizer, inputs, num_return_sequences=4)
    tokens = completions(out, inputs)
    expected = torch.cat([inputs["attention_mask"].repeat_interleave(4, 0), real_tokens(model, tokens).long()], 1)
    assert torch.equal(out.attention_mask, expected) and (expected == 0).any()
    logits = replay_forward(
        model, out.sequences, out.attention_mask, thinking_states=out.thinking_states, thinking_mask=out.thinking_mask
    ).logits[:, inputs["input_ids"].shape[1] - 1 : -1]
    for i, value in bias(tokenizer).items():
        logits[..., i] += value
    logps = (logits / TEMPERATURE).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    assert (logps - sampled_logps(out, inputs))[real_tokens(model, tokens)].abs().max() < 1e-4


def test_prompts_that_are_padded_on_the_right_are_refused():
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = "right"
    with pytest.raises(InputError, match="padded on the left"):
        think(tiny_model("llama"), tokenizer, ragged(tokenizer))
