"""What vLLM's engine is asked for by a sampling; without vLLM, whose own part is in tests/with_vllm."""

import pytest
from tiny import byte_tokenizer, tiny_model

from hrpo_patches.engines.base import sampling_of
from hrpo_patches.engines.vllm import ThinkingVLLM
from hrpo_thinking.errors import InputError


class Asked(ThinkingVLLM):
    """An engine without vLLM, which keeps what each generation is asked for."""

    def __init__(self, model, tokenizer, filler=None):
        self.model, self.processing_class, self._filler = model, tokenizer, filler
        self.thinking, self.forced, self.seeds, self.generation_kwargs = True, 0, [], {"top_k": 3}
        self.max_completion_length, self.temperature, self.top_p, self.top_k = 5, 1.0, 0.9, 3
        self.min_p, self.repetition_penalty, self.asked = None, 1.1, []

    def generate(self, prompts, images, num_generations, profiler=None):
        self.asked.append((self.forced, self.max_completion_length, self.temperature, self.generation_kwargs))
        return prompts, [[1, 2, 3]] * len(prompts), None, None


@pytest.mark.parametrize("ends", [None, 7, [7, 9]], ids=str)
def test_the_end_tokens_of_the_sampling_end_a_completion_and_no_others_of_the_models_files(ends):
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    model.generation_config.eos_token_id = ends  # as `load_adapter` sets the adapter's own
    engine = Asked(model, tokenizer)
    sampling = sampling_of(model, tokenizer, 4, True)
    engine.complete([[5]], sampling)
    expected = {None: [], 7: [7], (7, 9): [7, 9]}[tuple(ends) if isinstance(ends, list) else ends]
    assert tokenizer.eos_token_id is not None
    stops = {"ignore_eos": True, "stop_token_ids": [tokenizer.eos_token_id, *expected]}
    assert engine.asked == [(0, 4, 0.0, stops)]
    assert engine.generation_kwargs == {"top_k": 3}  # training's own


def test_another_filler_than_the_engine_was_started_with_is_refused():
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    (filler,) = tokenizer(".")["input_ids"]
    for started, named in ((None, filler), (40, 40), (None, None)):
        model.generation_config.filler_token_id = named
        engine = Asked(model, tokenizer, started)
        engine.complete([[5]], sampling_of(model, tokenizer, 4, True, thoughts=2))
        assert engine.asked[0][:2] == (2, 4)
    model.generation_config.filler_token_id = 41
    for started in (None, 40):
        engine = Asked(model, tokenizer, started)
        with pytest.raises(InputError, match="started with the filler token .*, and filler_token_id is 41"):
            engine.complete([[5]], sampling_of(model, tokenizer, 4, True, thoughts=2))
        engine.complete([[5]], sampling_of(model, tokenizer, 4, True))  # no filler is needed
