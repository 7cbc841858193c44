"""Tiny checkpoints and how unsloth loads them; shared by the tests on a CPU and on a GPU."""

import pytest
from programs import MAKE_CHECKPOINTS, python
from shared_fixtures import family, tokenizer

__all__ = ["checkpoints", "family", "load", "tokenizer"]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A folder with {family} (thinking weights in it) and plain-{family} (none), each with a tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoints")
    python("-c", MAKE_CHECKPOINTS, folder)
    return folder


@pytest.fixture
def load(checkpoints):
    """load(name, dtype, **options): a checkpoint through FastLanguageModel."""
    from unsloth import FastLanguageModel

    def load_(name, dtype, **options):
        return FastLanguageModel.from_pretrained(str(checkpoints / name), 256, dtype, load_in_4bit=False, **options)[0]

    return load_
