"""Imports unsloth so that its real Llama and Qwen2 code runs where there is no GPU; stubs devices, never thinking.

On a machine with a GPU it only imports. Has to come before torch is told anything about devices, and before
transformers. `import hrpo_patches` first, or not at all: unsloth as released is what the patched one is compared with.
"""

import os
import sys
import tempfile
from importlib.util import find_spec
from types import SimpleNamespace

import torch

ON_GPU = torch.cuda.is_available()
MEMORY = 24 << 30
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "UNSLOTH_COMPILE_LOCATION": os.path.join(tempfile.gettempdir(), "unsloth_compiled_cache"),
}
if not ON_GPU:
    os.environ |= {
        "UNSLOTH_ALLOW_CPU": "1",
        "UNSLOTH_COMPILE_DISABLE": "1",
        "TRITON_INTERPRET": "1",
        "TORCHDYNAMO_DISABLE": "1",
    }
    assert find_spec("torchvision") is None and find_spec("xformers") is None, "the harness is for CPU builds only"

import unsloth


class _Cpu(str):
    """The device "cpu", which counts as device 0 where a list has one entry for each GPU."""

    def __index__(self):
        return 0


def _stub_devices():
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in ("unsloth", "unsloth_zoo"):
            continue
        stubs = {
            "DEVICE_TYPE_TORCH": "cpu",
            "DEVICE_COUNT": 1,
            "SUPPORTS_BFLOAT16": True,
            "get_current_device": lambda: _Cpu("cpu"),
            "get_device_stats": lambda: ("CPU", "", MEMORY / 2**30),
        }
        for attribute, value in stubs.items():
            if hasattr(module, attribute):
                setattr(module, attribute, value)


def _stub_cuda_queries():
    properties = SimpleNamespace(name="CPU", total_memory=MEMORY, major=8, minor=0, multi_processor_count=1)
    queries = {
        "get_device_capability": (8, 0),
        "get_device_properties": properties,
        "mem_get_info": (MEMORY, MEMORY),
        "current_device": 0,
        "device_count": 1,
        "synchronize": None,
    }
    queries |= dict.fromkeys(("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"), 0)
    for name, answer in queries.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)


def _stub_rope_cache():
    from unsloth.models.llama import LlamaRotaryEmbedding

    original = LlamaRotaryEmbedding._set_cos_sin_cache

    def on_cpu_0(self, seq_len, device, dtype):
        return original(self, seq_len, torch.device("cpu", 0), dtype)

    LlamaRotaryEmbedding._set_cos_sin_cache = on_cpu_0


if not ON_GPU:
    _stub_devices()
    _stub_cuda_queries()
    _stub_rope_cache()

__all__ = ["ON_GPU", "unsloth"]
