"""The Chinese README says what the English one says: the same commands, code, links, names and numbers."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENGLISH, CHINESE = ((ROOT / name).read_text() for name in ("README.md", "README.zh-CN.md"))
BLOCKS = re.compile(r"```\w*\n.*?```", re.S)


def commands(text):
    return [line.partition("  #")[0].rstrip() for line in re.findall(r"^\$ .*$", text, re.M)]


def links(text):
    found = re.findall(r"\]\(([^)#]+)\)", BLOCKS.sub("", text))
    return sorted(link for link in found if not link.startswith("README"))


def names(text):
    return set(re.findall(r"`([^`\n]+)`", BLOCKS.sub("", text)))


def numbers(text):
    prose = re.sub(r"`[^`\n]*`|\]\([^)]*\)", "", BLOCKS.sub("", text))
    return set(re.findall(r"\d+(?:\.\d+)*%?", prose))


def code(text):
    return [block for block in BLOCKS.findall(text) if not block.startswith("```console")]


@pytest.mark.parametrize("part", [commands, links, names, code])
def test_both_have_the_same(part):
    assert part(CHINESE) == part(ENGLISH)
    assert part(ENGLISH)


def test_every_number_of_one_is_in_the_other():
    assert numbers(CHINESE) == numbers(ENGLISH) and len(numbers(ENGLISH)) > 20
    assert CHINESE.count("\n## ") == ENGLISH.count("\n## ")
