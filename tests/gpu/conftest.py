"""Skips everything where there is no GPU; else imports unsloth as it is, before anything imports transformers.

HRPO_DRY_RUN=1 runs what it can on the CPU harness instead, to see that the tests themselves are sound.
"""

import os

import hrpo_patches
import pytest
import torch

RUNS = torch.cuda.is_available() or os.environ.get("HRPO_DRY_RUN") == "1"
if RUNS:
    import harness
    from fixtures import checkpoints, family, load, tokenizer

    assert hrpo_patches.__version__ and harness.unsloth
    __all__ = ["checkpoints", "family", "load", "tokenizer"]
else:
    collect_ignore_glob = ["test_*.py"]


def pytest_sessionfinish(session):
    if not RUNS:
        print("skipped: no GPU is there. Nothing was tested.")
        session.exitstatus = pytest.ExitCode.OK
