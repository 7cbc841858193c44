"""vLLM's engine on a CPU, in this process, on tiny models; runs in an environment of its own (`make test-vllm`)."""

import os

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}

import hrpo_patches  # noqa: F401 - before transformers

import pytest
from shared_fixtures import family, tokenizer  # noqa: F401 - fixtures
