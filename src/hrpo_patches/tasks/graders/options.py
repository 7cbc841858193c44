"""Which of several options, A to H, an answer chooses."""

from __future__ import annotations

import re
import unicodedata

from hrpo_patches.tasks.graders.markup import tidy

_WRAPPED = re.compile(
    r"(?:\\(?:boxed|text|mathrm|textbf|mathbf)\s*\{|[*_$`\"]+|(?<!\w)')\s*\(?([A-Ha-h])\)?\s*(?:\}|[*_$`\"]+|'(?!\w))"
)
_MARKUP = re.compile(r"\\(?:boxed|text|mathrm|textbf|mathbf)\s*\{|[{}$_\"*`]|(?<!\w)'|'(?!\w)")
_LETTER = r"(?<![\w'°])([A-H])(?![\w'+])"
_LONE = re.compile(r"[\s(\[]*([A-Ha-h])[\s)\].:,!]*$")
# At the start: a letter and punctuation or a dash; a bare capital but A, which is mostly an article.
_FIRST = re.compile(r"[^\w\\]*(?:([A-H])(?:\s*[)\].:,]|\s+[-\u2014(])|([a-h])\s*[)\]]|([B-H])(?=\s+\S))")
_NAMED = re.compile(rf"(?i:answer|option|choice)(?i:\s+is)?:?\s*[(\[]?(?:{_LETTER}|([a-h])(?=[)\].,:]|$))")
# Without any of these, a letter is one only where something is said of it; of other capitals there are too many.
_SAID = re.compile(
    rf"(?i:\b(?:choose|pick|select|is|be|with|think|say|but|so|thus|therefore|it's)\s+|[=:\u2014]\s*)[(\[]?{_LETTER}"
    rf"|(?<!\S)\({_LETTER}\)(?=\W*$)|^[(\[]?{_LETTER}[)\]]?(?=\s+(?:is|was|because|since|as|seems|for)\b)"
)
_DENIED = re.compile(
    r"\b(?i:not|exclude|except|anything but)\s+(?i:option\s+|choice\s+)?[(\[]?[A-H]\b"
    r"|\b[A-H]\)?\s+is\s+(?:wrong|false|incorrect|not)\b"
)
# Another one behind it: "B or C", "(A), (C)"; "B, A sample" has an article behind it.
_ANOTHER = re.compile(r"[)\]]?(?:\s*(?:,|/|&|or\b|and\b))+\s*[(\[]?(?:[B-H](?![\w'])|A(?![\w'])(?!\s+[a-z]))")
_AN_ARTICLE = re.compile(r"\bA (?!(?:is|was|because|since|as|seems|for)\b)(?=[a-z])")


def _letters(matches: list[re.Match[str]], text: str) -> set[str | None]:
    """The letters of some matches, in capitals; None among them where another one comes at once."""
    found: set[str | None] = set()
    for match in matches:
        group = match.lastindex or 0
        several = _ANOTHER.match(text, match.end(group))
        found.add(None if several else match[group].upper())
    return found


def chosen(text: str) -> str | None:
    """The one option that a text chooses, a capital letter, or None."""
    text = unicodedata.normalize("NFKC", text)
    text = _MARKUP.sub("", tidy(_WRAPPED.sub(r"(\1)", _WRAPPED.sub(r"(\1)", text)))).strip()
    if lone := _LONE.match(text):
        return lone[1].upper()
    text = _DENIED.sub("", text).strip()
    first = _FIRST.match(text)
    letters = _letters([first] if first else list(_NAMED.finditer(text)), text)
    if not letters:
        text = _AN_ARTICLE.sub("", text)
        letters = _letters(list(_SAID.finditer(text)), text)
    return letters.pop() if len(letters) == 1 else None


def choice(gold: str, answer: str) -> bool:
    """Whether `answer` chooses the option `gold` and no other.

    A letter from A to H: alone; else at the start ("B. because", "**B** because"); else after "answer", "option" or
    "choice"; else a capital that is chosen, or called right, in words. "B or C" and "not B" choose nothing, and "A
    cat" is no A.
    """
    letter = chosen(answer)
    return letter is not None and letter == chosen(gold)
