"""Imports unsloth, with its devices stubbed, before anything imports transformers."""

import hrpo_patches
import harness
from fixtures import checkpoints, family, load, tokenizer

assert hrpo_patches.__version__ and harness.unsloth
__all__ = ["checkpoints", "family", "load", "tokenizer"]
