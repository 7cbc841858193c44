"""Imports hrpo_patches before transformers, and holds what many tests share."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network, and none waits for it

import hrpo_patches  # isort: skip - before transformers
from hypothesis import settings
from shared_fixtures import family, shared_data, smollm2, tokenizer

assert hrpo_patches.__version__
settings.register_profile("nightly", max_examples=10_000)  # pytest --hypothesis-profile=nightly
__all__ = ["family", "shared_data", "smollm2", "tokenizer"]
