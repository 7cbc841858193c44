"""Fixtures that the tests of both backends use."""

import pytest
from tiny import FAMILIES, byte_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(params=list(FAMILIES))
def family(request):
    return request.param
