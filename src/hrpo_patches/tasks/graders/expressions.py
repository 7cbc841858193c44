"""Whether an answer is a mathematical expression. math-verify says what is equal."""

from __future__ import annotations

import re

from hrpo_patches.tasks.graders.equal import equal
from hrpo_patches.tasks.graders.markup import BOXES, FONTS, tidy, without
from hrpo_patches.tasks.graders.numbers import DOUBT, is_bare_number, number, plain

_ENDS = " .,;"
_SYMBOLS = {
    "√": "\\sqrt ",
    "π": "\\pi ",
    "∞": "\\infty ",
    "×": "\\times ",
    "÷": "\\div ",
    "\\varnothing": "\\emptyset",
}
_DELIMITERS = re.compile(r"\\[()\[\]]|\${1,2}")
_FORMULA = re.compile(r"\$([^$]*)\$")
_NAME = r"\\(?:text|mathrm|mbox)\s*\{[^{}]*\}"
_UNIT = re.compile(rf"(?<=\S)\s*(?:{_NAME}|(?:\\,)?\\frac\{{{_NAME}\}}\{{{_NAME}\}})(?:\s*\^\s*\{{?[23]\}}?)?$")
_CONSTANT = re.compile(r"\\(?:math(?:rm|bf|it|sf)|text(?:rm|bf|it)?|operatorname)\s*\{\s*([ei])\s*\}")  # no units
_FACTORIAL = re.compile(r"[^a-zA-Z=]*\d\s*!\W*")  # and nothing else: after words, it is an exclamation
_BASE = re.compile(r"(?<=\d)_\s*\{?\s*(\d+)")
_COMMANDS = re.compile(r"\\(?:begin|end)\s*\{[a-z*]+\}|\\[a-zA-Z]+")
_PROSE = re.compile(r"(?!sqrt|frac|sin|cos|tan|log|exp)[a-zA-Z]{4,}|\b(?i:it|is|no|so|the|and|are|yes|but)\b")


def _folded(text: str) -> str:
    """A text as it is compared with another one: without markup, brackets around it and capitals."""
    text = "".join(without(BOXES + FONTS, _DELIMITERS.sub("", text)).split()).rstrip(_ENDS).casefold()
    return text[1:-1] if re.fullmatch(r"\([a-z]\)", text) else text


def _formula(text: str) -> str | None:
    """The formula in a text, between dollars; several are a list. None where prose leaves no telling."""
    text = _DELIMITERS.sub("$", text)
    text = without(BOXES, text) if "$" in text else without(BOXES, text, "$", "$")
    inside = _FORMULA.findall(text)
    outside = _FORMULA.sub(" ", text)
    if "$" in outside or (inside and re.search(r"\d", outside)):
        return None
    if inside and (len(inside) > 1 or re.search("[a-zA-Z]", outside)):
        formula = ", ".join(part.strip(_ENDS) for part in inside)
    else:
        formula = text.replace("$", "").strip(_ENDS)
    formula = _UNIT.sub("", _CONSTANT.sub(r"{\1}", formula))
    prose = _PROSE.search(_COMMANDS.sub(" ", without(FONTS, formula)))
    return None if prose and not inside else f"${formula}$"


def expression(gold: str, answer: str) -> bool:
    """Whether `answer` is the same expression as `gold`, in LaTeX, with or without $ or \\boxed.

    A number may have a unit and prose around it, as for `number`; another expression prose only outside of $ or
    \\boxed. Numerals in a base are equal in the same base.
    """
    raw = answer
    gold, answer = (tidy(text.replace("\\$", "")).strip(_ENDS) for text in (gold, answer))
    for symbol, command in _SYMBOLS.items():
        gold, answer = gold.replace(symbol, command), answer.replace(symbol, command)
    if not gold or not answer or answer.count("\\boxed") > 1:
        return False
    bare = is_bare_number(gold) and not _FACTORIAL.fullmatch(raw)
    if _folded(gold) == _folded(answer) or (bare and number(gold, answer)):
        return True
    if DOUBT.search(plain(answer)) or _BASE.findall(gold) != _BASE.findall(answer):
        return False
    formulas = _formula(gold), _formula(answer)
    return formulas[0] is not None and formulas[1] is not None and equal(formulas[0], formulas[1])
