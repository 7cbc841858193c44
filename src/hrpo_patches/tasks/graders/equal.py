"""Asks math-verify whether two formulas are equal, and does not wait for an answer that takes too long."""

from __future__ import annotations

import logging
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import sympy
from math_verify import parse, verify

if TYPE_CHECKING:
    from types import FrameType

_LIMIT = 0.6  # seconds
_DECIMAL = re.compile(r"\d{1,3}(?:,\d{3})+\.\d+|\d*\.\d+")
_LAST_DIGIT = 1e-14  # of a float, relative
_INTERRUPTED = ("math_verify", "latex2sympy2_extended", "antlr4", "sympy", "mpmath")  # no one else's callbacks
logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of limits that are set here

# Powers of powers, huge exponents, factorials of large numbers: sympy would work out every digit.
_TOWER = re.compile(r"(?:\^|\*\*)[\s{(]*\d+[\s})]*(?:\^|\*\*)|(?:\^|\*\*)[\s{(-]*\d{4,}|\d{4,}\s*!|!\s*[!)]*\s*!")
_LIGHT_COMMANDS = re.compile(r"\\(?:[dt]?frac|sqrt|pi|infty|cdot|times|left|right|text)(?![a-zA-Z])")
_LIGHT = re.compile(
    r"(?:[\d+\-/=<>()\[\]{},.;$\s%]|[a-zA-Z]|\*(?!\s*\*)"
    r"|(?<=[a-z\d])\^(?:\d|\{-?\d\})(?![\d^{])|(?<=\))\^(?:2|\{2\})(?![\d^{]))*"
)


def _is_light(formula: str) -> bool:
    """Whether sympy is done with it at once: few letters and brackets, and low powers."""
    bare = _LIGHT_COMMANDS.sub(" ", formula)
    few = sum(character.isalpha() for character in bare) <= 12 and bare.count("(") <= 3 and bare.count("{") <= 8
    return few and _LIGHT.fullmatch(bare) is not None


@contextmanager
def _time_limit() -> Iterator[None]:
    """Interrupt sympy when a formula takes too long; math-verify's own limits are whole seconds, one for each call.

    The time is the thread's own, so that a verdict does not depend on what else the machine does.
    """
    started = time.thread_time()

    def stop(_: int, frame: FrameType | None) -> None:
        package = frame.f_globals.get("__name__", "").partition(".")[0] if frame is not None else ""
        if package in _INTERRUPTED and time.thread_time() - started > _LIMIT:
            raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, _LIMIT, _LIMIT / 20)  # again and again: a parser may swallow one
    try:
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:  # also if the signal came just now
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _ask(gold: str, answer: str) -> bool:
    both = [parse(text, parsing_timeout=None) for text in (gold, answer)]
    if not all(both) or any(_is_cut(parsed) for parsed in both):
        return False
    exact = [[_exact(part, text) for part in parsed] for parsed, text in zip(both, (gold, answer), strict=True)]
    if not _is_irrational(exact[0][0]):
        both = exact
    if all(isinstance(parsed[0], sympy.Rational) for parsed in both):
        return bool(both[0][0] == both[1][0])
    return bool(verify(*both, timeout_seconds=None))


def _is_cut(parsed: list[Any]) -> bool:
    """Whether math-verify read the beginning of a formula only, up to what it does not know."""
    return any(isinstance(part, str) and part.count("{") != part.count("}") for part in parsed)


def _exact(value: object, text: str) -> Any:
    """A formula, parsed from a text, whose decimals are fractions as they are written: math-verify would round them.

    Other floats, which math-verify has computed (of e^{0.5}), stay.
    """
    if not isinstance(value, sympy.Basic | sympy.MatrixBase):
        return value  # the text itself, which math-verify keeps beside what it read
    written = [sympy.Rational(digits.replace(",", "")) for digits in _DECIMAL.findall(text)]
    fractions = {}
    for one in value.atoms(sympy.Float):
        close = [digits for digits in written if abs(abs(one) - digits) <= _LAST_DIGIT * abs(one)]
        if close:
            fractions[one] = close[0] * (1 if one >= 0 else -1)
    exact: Any = value.xreplace(fractions)
    return exact.doit() if getattr(exact, "is_number", False) else exact


def _is_irrational(value: object) -> bool:
    """Whether a formula has a number such as pi or a root: then decimals anywhere in it are right up to six places."""
    parts = value if isinstance(value, sympy.MatrixBase) else (value,)
    inner = (one for part in parts for one in sympy.preorder_traversal(part) if isinstance(one, sympy.Expr))
    return any(one.is_number and one.is_finite and not one.is_rational for one in inner)


def equal(gold: str, answer: str) -> bool:
    """Whether math-verify finds two formulas equal, the gold one first; what it cannot read is not.

    Outside of the main thread, which no clock's signal reaches, only light formulas are asked about, and others are
    not equal.
    """
    if _TOWER.search(answer):
        return False
    try:
        if threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):
            with _time_limit():
                return _ask(gold, answer)
        return _is_light(gold) and _is_light(answer) and _ask(gold, answer)
    except Exception:  # sympy raises all kinds on texts that are not mathematics
        return False
