"""What cannot think in vLLM is refused in a sentence, and a model that does not think meets nothing of us."""

import subprocess
import sys

import pytest
from engines import THINKING, big_enough, engine, generated, plain
from safetensors.torch import load_file, save_file
from vllm import SamplingParams
from vllm.sampling_params import BeamSearchParams, RepetitionDetectionParams, StructuredOutputsParams

from hrpo_vllm import names
from hrpo_patches.models.checkpoint import mark
from hrpo_thinking.errors import InputError

pytestmark = pytest.mark.usefixtures("engines_end")


@pytest.mark.parametrize(
    ("thinking", "options", "says"),
    [
        ({"residual": "embedding"}, {}, "hands over no distribution"),
        ({}, {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative decoding"),
        ({}, {"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({}, {"enable_prompt_embeds": True}, "prompts given as embeddings"),
        ({}, {"worker_cls": "my.Worker"}, "an own worker"),
    ],
    ids=str,
)
def test_an_engine_that_cannot_think_as_its_model_does_is_not_made(tokenizer, tmp_path, thinking, options, says):
    model = big_enough("llama", thinking=THINKING | thinking)
    with pytest.raises(ValueError, match=says), engine(model, tokenizer, tmp_path, **options):
        pass


def test_a_version_out_of_range_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(names, "vllm_version", lambda: "0.23.0")
    with pytest.raises(InputError, match=r"from 0.24 to before 0.34; 0.23.0 is installed"):
        names.check_version()


def test_a_checkpoint_that_lost_a_thinking_weight_is_not_served(tokenizer, tmp_path):
    model = big_enough("llama")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    mark(tmp_path)
    model.config.thinking["in_checkpoint"] = True
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.thinking_residual_Lambda.Lambda"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with (
        pytest.raises(InputError, match=r"thinking_residual_Lambda.Lambda is missing"),
        engine(model, tokenizer, tmp_path),
    ):
        pass


def test_requests_that_cannot_be_thought_are_refused_and_the_next_is_right(tokenizer, tmp_path):
    model = big_enough("llama")
    prompt, (filler,) = tokenizer("Hi")["input_ids"], tokenizer(".")["input_ids"]
    with engine(model, tokenizer, tmp_path) as llm:
        for extra, says in (
            ({"thinking": "maybe"}, "thinking must be true or false"),
            ({"thoughts": 8}, "thoughts=8 must be smaller than the smaller of max_tokens .* context=8"),
            ({"thoughts": "two"}, "thoughts must be a whole number"),
            ({"thoughts": True}, "thoughts must be a whole number"),
            ({"thinking": False, "thoughts": 3}, "only generate supports forced thoughts"),
            ({"thinking_key": ["one"]}, "thinking_key must be a text"),
        ):
            with pytest.raises(ValueError, match=says):
                llm.generate([{"prompt_token_ids": prompt}], SamplingParams(max_tokens=8, extra_args=extra))
        for options, says in (
            ({"allowed_token_ids": [filler + 1]}, "allowed_token_ids cannot be combined with forced thoughts"),
            ({"bad_words": ["."]}, "bad_words cannot be combined with forced thoughts"),
            ({"stop": ["."]}, "stop cannot be combined with forced thoughts"),
            ({"stop_token_ids": [filler]}, "ends a completion; name another one"),
            (
                {"structured_outputs": StructuredOutputsParams(regex="a+")},
                "structured_outputs cannot be combined",
            ),
            (
                {"repetition_detection": RepetitionDetectionParams(4, 1, 2)},
                "repetition_detection cannot be combined",
            ),
        ):
            with pytest.raises(ValueError, match=says):
                asked = SamplingParams(max_tokens=8, extra_args={"thoughts": 2}, **options)
                llm.generate([{"prompt_token_ids": prompt}], asked)
        some = SamplingParams(max_tokens=4, temperature=0.0, allowed_token_ids=[filler], extra_args={"thoughts": 2})
        (output,) = llm.generate([{"prompt_token_ids": prompt}], some, use_tqdm=False)
        assert list(output.outputs[0].token_ids) == [filler] * 4
        with pytest.raises(ValueError, match="ask for n=1"):
            keyed = SamplingParams(max_tokens=8, n=2, extra_args={"thinking_key": "one"})
            llm.generate([{"prompt_token_ids": prompt}], keyed)
        with pytest.raises(ValueError, match="beam search cannot think"):
            llm.beam_search([{"prompt_token_ids": prompt}], BeamSearchParams(beam_width=2, max_tokens=4))
        given = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
        (output,) = llm.generate([{"prompt_token_ids": prompt}], given, use_tqdm=False)
        assert list(output.outputs[0].token_ids) == generated(model, tokenizer, prompt, new=8)[0]


def test_the_models_own_forced_thoughts_need_room_too_and_a_plain_request_has_none(tokenizer, tmp_path):
    model = big_enough("llama", thinking=THINKING | {"thoughts": 3})
    prompt = tokenizer("Hi")["input_ids"]
    with engine(model, tokenizer, tmp_path) as llm:
        for ids, new, room in ((prompt, 3, 3), (prompt * 127, None, 256 - 127 * len(prompt))):
            with pytest.raises(ValueError, match=f"thoughts=3 must be smaller than .*={room}"):
                llm.generate([{"prompt_token_ids": ids}], SamplingParams(max_tokens=new))
        assert plain(llm, [prompt], new=3) == [generated(model, tokenizer, prompt, new=3, thinking=False)[0]]


def test_a_filler_that_the_tokenizer_lacks_is_refused_and_the_engine_lives_on(tokenizer, tmp_path):
    model = big_enough("llama", thinking=THINKING | {"filler": "<no such token>"})
    prompt = tokenizer("Hi")["input_ids"]
    with engine(model, tokenizer, tmp_path) as llm:
        with pytest.raises(ValueError, match="no token for the filler"):
            plain(llm, [prompt], thinking=True, thoughts=1)
        assert plain(llm, [prompt], thinking=True) == [generated(model, tokenizer, prompt)[0]]


def test_a_model_that_does_not_think_has_vllms_own_class_worker_and_scheduler(tokenizer, tmp_path):
    model = big_enough("llama", thinking=None)
    with engine(model, tokenizer, tmp_path) as llm:
        worker = llm.llm_engine.model_executor.driver_worker.worker
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        for part in (worker, worker.model_runner, worker.model_runner.model, scheduler):
            assert type(part).__module__.startswith("vllm.")
        assert "add_request" not in vars(scheduler) and "_model_forward" not in vars(worker.model_runner)


ALONE = """
import sys
from vllm import LLM
try:
    LLM(sys.argv[1], enforce_eager=True, max_model_len=64)
except Exception as error:
    print(error)
"""


def test_vllm_without_the_plug_in_refuses_the_model_by_name(tokenizer, tmp_path, monkeypatch):
    big_enough("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    mark(tmp_path)
    monkeypatch.setenv("VLLM_PLUGINS", "")
    done = subprocess.run([sys.executable, "-c", ALONE, tmp_path], capture_output=True, text=True)
    assert "needs: import hrpo_patches" in done.stdout, done.stderr[-2000:]
