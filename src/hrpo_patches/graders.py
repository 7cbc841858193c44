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
_EMPHASIS = re.compile(r"(?<!\S)\*\*|\*\*(?=[\s.,:;!?)]|$)")
_NUMBER = re.compile(r"(^-\s?|(?<![\w)\]])-)?(?:[$€£¥](-?))?(\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(\s?/\s?\d+)?")
_THOUSANDS = re.compile(r"(?<=\d) (?=\d{3}(?:\D|$))")
_UNIT_POWER = re.compile(r"(?<=[a-zA-Z])\s*(?:\^\s*\{?[23]\}?|[²³])")
# What makes a number another one, or no statement of a number.
_UNSURE = re.compile(
    r"[<>≠≤≥±+]\s*[\w(]*\d|\d\s*\+|-\s*\(|\d\s?[kK]\b"
    r"|\b(?i:not|minus|negative|hundred|thousand|million|billion|dozen|(?:less|more)\s+than|at\s+(?:least|most))\b"
)
# Powers of powers, huge exponents, factorials of large numbers: sympy would work out every digit.
_TOWER = re.compile(r"(?:\^|\*\*)[\s{(]*\d+[\s})]*(?:\^|\*\*)|(?:\^|\*\*)[\s{(-]*\d{4,}|\d{4,}\s*!|!\s*[!)]*\s*!")
_HEAVY = re.compile(r"(?:\^|\*\*)[\s{(-]*\d{3,}|\\(?:d?binom|prod|sum|int|lim)|!")

_IN_WORDS = re.compile(r"\\(?:text|mathrm|textbf)\s*\{([^{}]*)\}")
_PROSE = re.compile(r"(?<![\\a-zA-Z{])(?!sqrt|frac|sin|cos|tan|log|exp)[a-zA-Z]{4,}")

_LETTER = r"(?<![\w'])([A-H])(?![\w'])"
_WRAPPING = re.compile(r"\\(?:boxed|text|mathrm|textbf)|[{}$_\"*`]|(?<!\w)'|'(?!\w)")
_LONE = re.compile(r"[\s(\[]*([A-Ha-h])[\s)\].:,!]*$")
_FIRST = re.compile(r"[\s(\[]*(?:([A-H])\s*[)\].:,]|([a-h])\s*[)\]])")
_NAMED = re.compile(rf"(?i:answer|option|choice)(?i:\s+is)?:?\s*[(\[]?(?:{_LETTER}|([a-h])(?=[)\].,:]|$))")
_DENIED = re.compile(
    r"\b(?i:not|exclude|except|anything but)\s+(?i:option\s+|choice\s+)?[(\[]?[A-H]\b"
    r"|\b[A-H]\)?\s+is\s+(?:wrong|false|incorrect|not)\b"
)
_SEVERAL = re.compile(rf"{_LETTER}[)\]]?(?:\s*(?:,|/|&|or\b|and\b))+\s*[(\[]?{_LETTER}")
_AN_ARTICLE = re.compile(r"\bA (?!(?:is|was|because|since|as|seems|for)\b)(?=[a-z])")

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _tidy(text: str) -> str:
    """One line, with ASCII digits, dashes and spaces where Unicode has others, and without emphasis."""
    plain = unicodedata.normalize("NFKC", text[:_LONGEST]).translate(_DASHES)
    return " ".join(_EMPHASIS.sub("", plain).split())


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
    """The numbers in a text: digits, perhaps with a sign or a denominator."""
    found = _NUMBER.findall(_THOUSANDS.sub("", text))
    return [
        f"{'-' if '-' in before + after else ''}{digits.replace(',', '')}{under}".replace(" ", "")
        for before, after, digits, under in found
    ]


def is_number(gold: str) -> bool:
    """Whether a gold answer holds exactly one number."""
    return len(_numbers(_tidy(gold))) == 1


def number(gold: str, answer: str) -> bool:
    """Whether the one number in `answer` is `gold`.

    Units, currencies, percent signs, thousands separators and prose may surround it. Two numbers are wrong, for one of
    them would often be right, and so is what makes it another number ("minus 5", "5 thousand", "> 5", "5 + x").
    LaTeX is read as an expression.
    """
    text = _tidy(_UNIT_POWER.sub("", answer.replace("\\$", "$").replace("\\%", "%")))
    if "\\" in text:
        return expression(gold, answer)
    golds, given = _numbers(_tidy(gold)), _numbers(text)
    if len(golds) != 1 or len(given) != 1 or _UNSURE.search(text.lstrip("+")):
        return False
    return golds == given or _equal(golds[0], given[0])


def expression(gold: str, answer: str) -> bool:
    """Whether `answer` is the same expression as `gold`, in LaTeX, with or without $ or \\boxed."""
    gold, answer = (_tidy(text.replace("\\$", "")) for text in (gold, answer))
    if not gold or not answer or answer.count("\\boxed") > 1:
        return False
    plain_gold, plain = (_IN_WORDS.sub(r"\1", text).casefold() for text in (gold, answer))
    if plain_gold == plain:
        return True
    in_a_thread = threading.current_thread() is not threading.main_thread()
    if _TOWER.search(answer) or (in_a_thread and _HEAVY.search(answer)):
        return False
    return _equal(_as_latex(gold), _as_latex(answer))


def _as_latex(text: str) -> str:
    """A bare formula between dollars; prose as it is, or its letters would become factors."""
    marked = any(mark in text for mark in ("$", "\\boxed", "\\(", "\\["))
    return text if marked or _PROSE.search(text) else f"${text}$"


def _chosen(text: str) -> str | None:
    """The one option that a text chooses, a capital letter."""
    text = _WRAPPING.sub("", _tidy(text)).strip()
    if lone := _LONE.match(text):
        return lone[1].upper()
    if _SEVERAL.search(text):
        return None
    text = _DENIED.sub("", text)
    first = _FIRST.match(text)
    named = [first.groups()] if first else _NAMED.findall(text)
    letters = {"".join(filter(None, pair)).upper() for pair in named}
    letters = letters or set(re.findall(_LETTER, _AN_ARTICLE.sub("", text)))
    return letters.pop() if len(letters) == 1 else None


def choice(gold: str, answer: str) -> bool:
    """Whether `answer` chooses the option `gold` and no other.

    A letter from A to H: alone; else at the start, before punctuation ("B. because"), or after "answer", "option" or
    "choice"; else the only capital that stands alone and is no article. "B or C" and "not B" choose nothing.
    """
    chosen = _chosen(answer)
    return chosen is not None and chosen == _chosen(gold)


def normalized(text: str) -> str:
    """SQuAD's normalisation: lower case, no ASCII punctuation, no articles, single spaces; after Unicode's NFC."""
    text = unicodedata.normalize("NFC", text[:_LONGEST]).lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(gold: str, answer: str) -> bool:
    """Whether two names are equal after SQuAD's normalisation; a name that it leaves nothing of, as they are."""
    if not normalized(gold):
        return bool(gold.strip()) and gold.strip() == answer.strip()
    return normalized(gold) == normalized(answer)
