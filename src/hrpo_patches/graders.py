"""Says whether an answer is right; knows two texts, the gold answer and the given one, and not where they come from.

Four kinds: numbers, mathematical expressions, options, and names. Rewards and evaluations use the same functions; none
raises, whatever the texts. Whether two numbers or expressions are equal is math-verify's to say.
"""

from __future__ import annotations

import logging
import re
import signal
import string
import threading
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from math_verify import parse, verify

Grader = Callable[[str, str], bool]

_LONGEST = 200  # characters of an answer that are read
_LIMIT = 0.6  # seconds
logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of limits that are set here

_DASHES = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2212", "-"))
_NUMBER = re.compile(r"(^-\s?|(?<![\w)\]])-)?(?:[$€£¥](-?))?(\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(\s?/\s?\d+)?(\s?%)?")
_THOUSANDS = re.compile(r"(?<=\d) (?=\d{3}(?:\D|$))")
# Powers of powers, huge exponents, factorials of large numbers: sympy would work out every digit.
_TOWER = re.compile(r"(?:\^|\*\*)[^,;]*(?:\^|\*\*|!)|![^,;]*[!^]|\d{4,}\s*!|(?:\^|\*\*)[\s{(-]*\d{5,}")

_IN_WORDS = re.compile(r"\\(?:text|mathrm|textbf)\s*\{([^{}]*)\}")
_PROSE = re.compile(r"(?<![\\a-zA-Z{])(?!sqrt|frac|sin|cos|tan|log|exp)[a-zA-Z]{4,}")

_LETTER = r"(?<![\w'])([A-H])(?![\w'])"
_LONE = re.compile(r"[\s(\[{]*([A-Ha-h])[\s)\]}.:,]*$")
_FIRST = re.compile(r"[\s(\[{]*([A-H])\s*[)\]}.:]")
_NAMED = re.compile(rf"(?i:answer|option|choice)(?i:\s+is)?:?\s*[(\[]?{_LETTER}")
_SEVERAL = re.compile(rf"{_LETTER}[)\]]?\s*(?:,|/|&|or|and)\s*[(\[]?{_LETTER}")
_AN_ARTICLE = re.compile(r"\bA (?=[a-z])")

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _tidy(text: str) -> str:
    """One line, with ASCII digits, dashes and spaces where Unicode has others, and without emphasis."""
    return " ".join(unicodedata.normalize("NFKC", text[:_LONGEST]).translate(_DASHES).replace("**", "").split())


@contextmanager
def _time_limit() -> Iterator[None]:
    """Interrupt sympy when an answer takes too long; threads have to do without, for signals reach the main one only.

    math-verify's own limits are whole seconds, one for each call.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, _LIMIT, _LIMIT / 10)  # again and again: a parser may swallow one
    try:
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:  # also if the signal came just now
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _equal(gold: str, answer: str) -> bool:
    """Whether math-verify finds two texts equal."""
    try:
        with _time_limit():
            parsed_gold, parsed = (parse(text, parsing_timeout=None) for text in (gold, answer))
            return bool(parsed_gold and parsed) and bool(verify(parsed_gold, parsed, timeout_seconds=None))
    except Exception:  # sympy raises all kinds on texts that are no mathematics
        return False


def _numbers(text: str) -> list[str]:
    """The numbers in a text: digits, perhaps with a sign, a denominator or a percent sign."""
    found = _NUMBER.findall(_THOUSANDS.sub("", text))
    return [
        f"{'-' if '-' in before + after else ''}{digits.replace(',', '')}{under}{percent}".replace(" ", "")
        for before, after, digits, under, percent in found
    ]


def number(gold: str, answer: str) -> bool:
    """Whether the one number in `answer` is `gold`; units, currencies, thousands separators and prose may surround it.

    Two numbers are wrong, for one of them would often be right. LaTeX is read as an expression.
    """
    text = _tidy(answer.replace("\\$", "$").replace("\\%", "%"))
    if "\\" in text:
        return expression(gold, answer)
    golds, given = _numbers(_tidy(gold)), _numbers(text)
    return len(golds) == len(given) == 1 and (golds == given or _equal(golds[0], given[0]))


def expression(gold: str, answer: str) -> bool:
    """Whether `answer` is the same expression as `gold`, in LaTeX, with or without $ or \\boxed."""
    gold, answer = (_tidy(text.replace("\\$", "")) for text in (gold, answer))
    if not gold or not answer or answer.count("\\boxed") > 1 or _TOWER.search(answer):
        return False
    plain_gold, plain = (_IN_WORDS.sub(r"\1", text).casefold() for text in (gold, answer))
    return plain_gold == plain or _equal(_as_latex(gold), _as_latex(answer))


def _as_latex(text: str) -> str:
    """A bare formula between dollars; prose as it is, or its letters would become factors."""
    marked = any(mark in text for mark in ("$", "\\boxed", "\\(", "\\["))
    return text if marked or _PROSE.search(text) else f"${text}$"


def choice(gold: str, answer: str) -> bool:
    """Whether `answer` chooses the option `gold` and no other.

    A letter from A to H: alone, in either case; else a capital at the start, before punctuation ("B. because"), or
    after "answer", "option" or "choice"; else the only capital that stands alone and is no article. "B or C" is wrong.
    """
    text, gold = _tidy(answer), gold.strip().upper()
    if lone := _LONE.match(text):
        return lone[1].upper() == gold
    if _SEVERAL.search(text):
        return False
    first = _FIRST.match(text)
    named = [first[1]] if first else _NAMED.findall(text) or re.findall(_LETTER, _AN_ARTICLE.sub("", text))
    return set(named) == {gold}


def normalized(text: str) -> str:
    """SQuAD's normalisation: lower case, no ASCII punctuation, no articles, single spaces; after Unicode's NFC."""
    text = unicodedata.normalize("NFC", text[:_LONGEST]).lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(gold: str, answer: str) -> bool:
    """Whether two names are equal after SQuAD's normalisation; an empty one matches nothing."""
    return bool(normalized(gold)) and normalized(gold) == normalized(answer)
