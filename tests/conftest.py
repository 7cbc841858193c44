"""Imports hrpo_patches before transformers, and holds what many tests share."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network, and none waits for it

import hrpo_patches  # isort: skip - before transformers
import pytest
import torch
from shared_fixtures import family, tokenizer

assert hrpo_patches.__version__
__all__ = ["family", "tokenizer"]


@pytest.fixture(scope="session")
def smollm2():
    """(model, tokenizer) of the real SmolLM2-135M-Instruct."""
    from hrpo_patches.models.base import load_model
    from hrpo_patches.models.smollm2 import SMOLLM2
    from hrpo_thinking.config import ThinkingConfig

    model, tokenizer = load_model(SMOLLM2, ThinkingConfig(), torch.float32)
    return model.eval(), tokenizer


@pytest.fixture(scope="session")
def shared_data():
    """The folder that holds gsm8k/train.jsonl; see the marker shared_data."""
    folder = Path(os.environ.get("HRPO_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
    assert (folder / "gsm8k" / "train.jsonl").is_file(), f"no GSM8K under {folder}; set HRPO_SHARED_DATA"
    return folder
