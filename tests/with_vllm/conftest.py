"""vLLM's engine on a CPU, in this process, on tiny models; runs in an environment of its own (`make test-vllm`)."""

import os
import socket

with socket.socket() as free:  # each worker its own: two that train at once must not meet at torch's default
    free.bind(("127.0.0.1", 0))
    os.environ["MASTER_PORT"] = str(free.getsockname()[1])
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CONFIGURE_LOGGING": "0",  # its own handler would hold on to the standard output of one test
}

import hrpo_patches  # noqa: F401 - before transformers, which the rest imports

import gc

import pytest
from shared_fixtures import family, shared_data, smollm2, tokenizer  # noqa: F401 - fixtures
from vllm import LLM

from hrpo_patches.engines import vllm


@pytest.fixture(autouse=True, scope="session")
def small_caches():
    """Engines of training take little memory."""
    vllm.CACHE = 64 << 20


@pytest.fixture
def engines_end(monkeypatch):
    """Engines that are made in a test have no part in the next one."""
    made, make = [], LLM.__init__

    def init(self, *args, **kwargs):
        make(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(LLM, "__init__", init)
    yield
    while made:
        made.pop().llm_engine.engine_core.shutdown()
    gc.collect()
