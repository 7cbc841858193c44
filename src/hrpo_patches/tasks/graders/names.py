"""Whether two names are the same, as SQuAD has it (Rajpurkar et al., arXiv 1606.05250)."""

from __future__ import annotations

import re
import string
import unicodedata

from hrpo_patches.tasks.graders.markup import LONGEST

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """SQuAD's normalisation: lower case, no ASCII punctuation, no articles, single spaces; after Unicode's NFC."""
    text = unicodedata.normalize("NFC", text[:LONGEST]).lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(gold: str, answer: str) -> bool:
    """Whether two names are equal after SQuAD's normalisation; a name that it leaves nothing of, as they are."""
    if not normalized(gold):
        return bool(gold.strip()) and gold.strip() == answer.strip()
    return normalized(gold) == normalized(answer)
