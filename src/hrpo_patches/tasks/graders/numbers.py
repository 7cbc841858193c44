"""Whether an answer is a number. Whether two are equal is math-verify's to say."""

from __future__ import annotations

import re

from hrpo_patches.tasks.graders.equal import equal
from hrpo_patches.tasks.graders.markup import BOXES, FONTS, tidy, without

_NUMBER = re.compile(
    r"(^-\s?|(?<![\w)\]])-)?(?:[$€£¥]([-+]?))?((?<![A-Za-z\d])\d+(?:,\d{3})*(?:\.\d+)?|(?<![\w.])\.\d+)(\s?/\s?\d+)?"
)
_ALONE = re.compile(r"\s*[-+]?[$€£¥]?-?[\d,.]*\d(?:\s?/\s?\d+)?\s?%?\s*")
_UNIT_POWER = re.compile(r"(?<=[a-zA-Z])\s*\^\s*\{?[23]\}?")
_DECORATION = re.compile(
    r"[=-]+>|→|</?[a-zA-Z]\w*>|\^?\{?\\(?:circ|degree)\}?|°|\\[()\[\];: ]|\\(?:left|right|q?quad)\b|~"
)
_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{\s*(-?\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))")
_SEPARATOR = re.compile(r"(?<=\d)(?:\{,\}|\\[,!])\s*(?=\d{3}(?!\d))")
_THOUSANDS = re.compile(r"(?<=\d) (?=\d{3}(?:[\s.,;]|$))")
_CURRENCY = re.compile(r"\b(?:Rs|USD|EUR|GBP)\.?\s?(?=\d)")

# Words that make a number another one, or no statement of a number.
DOUBT = re.compile(
    r"(?i:(?:\bnot\b|n't\b)[^\d,.;:]*\d"
    r"|\b(?:minus|negative|(?:more|less|fewer|greater|larger|smaller)\s+than|at\s+(?:least|most))\s+[($€£¥]*\d"
    r"|\b(?:hundred|thousand|million|billion|trillion|dozen|lakh|crore)s?\b"
    r"|\band\s+(?:a|one)\s+(?:half|third|quarter)\b|\b(?:or|either|maybe)\b)|\d\s?(?:[kKM]|bn)\b"
)
# Signs that make it a part of a formula.
_OPERATORS = re.compile(
    r"[<>≠≤≥±√^]|[\w)]\s*\+|\+\s*[a-zA-Z(]|-\s*\(|\b[a-zA-Z]\s*[-*/]\s*\(?\d|\d\s*[-*/]\s*[a-zA-Z]\b|\d\s?[xyz]\b|\bsqrt"
)


def plain(text: str) -> str:
    """A text without currency codes, units' powers, arrows, tags and the LaTeX that numbers are written in."""
    text = without(BOXES + FONTS, tidy(text))
    text = text.replace("\\$", "$").replace("\\%", "%")
    text = _FRACTION.sub(lambda parts: f"{parts[1] or parts[2]}/{parts[3] or parts[4]}", _SEPARATOR.sub("", text))
    text = _DECORATION.sub(" ", text.replace("\\,", " "))
    return _CURRENCY.sub("", " ".join(_UNIT_POWER.sub("", text).split()))


def _numbers(text: str) -> list[str]:
    """The numbers in a plain text: digits, perhaps with a sign or a denominator."""
    return [
        f"{'-' if '-' in before + after else ''}{digits.replace(',', '')}{under}".replace(" ", "")
        for before, after, digits, under in _NUMBER.findall(_THOUSANDS.sub("", text))
    ]


def _stated(text: str) -> str | None:
    """The one number that a text states."""
    text = plain(text)
    numbers = _numbers(text)
    if "\\" in text or len(numbers) != 1 or DOUBT.search(text) or _OPERATORS.search(text):
        return None
    return numbers[0]


def is_number(gold: str) -> bool:
    """Whether a gold answer states exactly one number."""
    return _stated(gold) is not None


def is_bare_number(gold: str) -> bool:
    """Whether a gold answer is a number without unit or prose."""
    return _ALONE.fullmatch(plain(gold)) is not None and is_number(gold)


def number(gold: str, answer: str) -> bool:
    """Whether `answer` states the number `gold` and no other.

    Units, currencies, percent signs, thousands separators, prose and LaTeX's markup may surround it. Two numbers are
    wrong, because one of them would often be right, and so is what makes it another number ("minus 5", "5 thousand",
    "more than 5") or a formula ("> 5", "5 + x", "3 \\times 4").
    """
    stated, given = _stated(gold), _stated(answer)
    return stated is not None and given is not None and (stated == given or equal(f"${stated}$", f"${given}$"))
