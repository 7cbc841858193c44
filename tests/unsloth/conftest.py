"""Tiny checkpoints; unsloth itself is imported here, before anything imports transformers."""

import hrpo_patches
import harness
import pytest
from programs import MAKE_CHECKPOINTS, python
from tiny import FAMILIES, byte_tokenizer

assert hrpo_patches.__version__ and harness.unsloth


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A folder with {family} (thinking weights in it) and plain-{family} (none), each with a tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoints")
    python("-c", MAKE_CHECKPOINTS, folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(params=list(FAMILIES))
def family(request):
    return request.param


@pytest.fixture
def load(checkpoints):
    """load(name, dtype, **options): a checkpoint through FastLanguageModel."""
    from unsloth import FastLanguageModel

    def load_(name, dtype, **options):
        return FastLanguageModel.from_pretrained(str(checkpoints / name), 256, dtype, load_in_4bit=False, **options)[0]

    return load_
