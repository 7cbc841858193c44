"""What a GPU's engine needs, as far as a machine without one can tell."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from engines import big_enough, engine, thought

from hrpo_thinking.errors import InputError
from hrpo_thinking.marker import marker_table
from hrpo_vllm.requests import EngineThoughts, Scheduled
from hrpo_vllm.workers import ThinkingWorker, prepare

STREAMS = """
import torch
names = ("Stream", "Event", "current_stream", "stream")
before = [getattr(torch.cuda, name) for name in names] + [torch.Tensor.pin_memory, torch.accelerator.empty_cache]
import hrpo_vllm.engine, hrpo_vllm.models, hrpo_vllm.workers
from hrpo_thinking.families import FAMILIES
made = [getattr(hrpo_vllm.models, "Thinking" + one.causal_lm) for one in FAMILIES.values() if one.vllm]
assert made[0] is hrpo_vllm.models.ThinkingLlamaForCausalLM
after = [getattr(torch.cuda, name) for name in names] + [torch.Tensor.pin_memory, torch.accelerator.empty_cache]
assert all(one is other for one, other in zip(before, after)), (before, after)
"""


def test_importing_what_a_gpus_engine_imports_leaves_cudas_streams():
    done = subprocess.run([sys.executable, "-c", STREAMS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_backbone_reads_its_inputs_at_one_address_in_every_step(tokenizer, tmp_path):
    addresses = set()
    with engine(big_enough("llama"), tokenizer, tmp_path) as llm:
        model = llm.llm_engine.model_executor.driver_worker.model_runner.get_model()

        forward = model.model.forward

        def watched(*args, **kwargs):
            inputs = kwargs.get("inputs_embeds", args[3] if len(args) > 3 else None)
            addresses.add(inputs.data_ptr())
            return forward(*args, **kwargs)

        model.model.forward = watched
        thought(llm, [tokenizer("Hi")["input_ids"], tokenizer("What is 3 + 4?")["input_ids"]], new=8)
    assert len(addresses) == 1


def test_an_engines_own_requests_may_think_before_weights_have_arrived(tokenizer):
    def missing():
        raise InputError("no weights have arrived")

    table = marker_table(tokenizer, "####")
    thoughts = EngineThoughts(8, 16, 4, table, 0, None, torch.float32)
    thoughts.add("made up", 1, [], None)
    model = SimpleNamespace(thoughts=thoughts, warming_up=False, check_arrived=missing)
    step = [Scheduled("made up", 0, 1, 1)]

    class Warm:
        def compile_or_warm_up_model(self):
            prepare(model, step, torch.zeros(1, dtype=torch.long))
            return "warm"

    class Worker(ThinkingWorker, Warm):
        model_runner = SimpleNamespace(get_model=lambda: model)

    assert Worker().compile_or_warm_up_model() == "warm"
    with pytest.raises(InputError, match="no weights"):
        prepare(model, step, torch.zeros(1, dtype=torch.long))
