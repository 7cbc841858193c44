"""Fixtures that the tests of every environment use."""

import os
from pathlib import Path

import pytest
from tiny import FAMILIES, byte_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


# For tests that a family's diffs decide: what stock computes, rollout = replay = gradient, and files.
every_family = pytest.mark.parametrize("family", list(FAMILIES))


@pytest.fixture(params=["llama", "qwen2", "qwen3"])
def family(request):
    """Without biases, with biases, with norms of queries and keys."""
    return request.param


@pytest.fixture(scope="session")
def smollm2():
    """(model, tokenizer) of the real SmolLM2-135M-Instruct, whose thoughts weigh enough to change tokens."""
    import torch

    from hrpo_patches.models.base import load_model
    from hrpo_patches.models.smollm2 import SMOLLM2
    from hrpo_thinking.config import ThinkingConfig

    torch.manual_seed(1)
    model, tokenizer = load_model(SMOLLM2, ThinkingConfig(r_min=0.9, r_max=0.98), torch.float32)
    return model.eval(), tokenizer


@pytest.fixture(scope="session")
def shared_data():
    """The folder that holds gsm8k/train.jsonl; see the marker shared_data."""
    folder = Path(os.environ.get("HRPO_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
    assert (folder / "gsm8k" / "train.jsonl").is_file(), f"no GSM8K under {folder}; set HRPO_SHARED_DATA"
    return folder
