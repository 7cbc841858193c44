"""Takes off what only says how a text looks: Unicode's variants of ASCII, emphasis, LaTeX's boxes and fonts."""

from __future__ import annotations

import re
import unicodedata

LONGEST = 200  # characters of an answer that are read
FONTS = ("text", "textbf", "textit", "mathrm", "mathbf", "mbox", "underline")
BOXES = ("boxed", "fbox")

_DASHES = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2212", "-") | {"\u2044": "/"})
_EMPHASIS = re.compile(r"(?<!\S)\*\*|\*\*(?=[\s.,:;!?)]|$)")
_SUPERSCRIPTS = re.compile(r"(?<=[\w)])[\u00b2\u00b3\u00b9\u2070\u2074-\u2079]+")
_VULGAR = re.compile(r"(?<=\d)(?=[\u00bc-\u00be\u2150-\u215e])")


def tidy(text: str) -> str:
    """One line, with ASCII digits, powers, fractions, dashes and spaces where Unicode has others, without emphasis."""
    text = _SUPERSCRIPTS.sub(lambda digits: f"^{digits[0]}", text[:LONGEST])
    plain = unicodedata.normalize("NFKC", _VULGAR.sub(" ", text)).translate(_DASHES)
    return " ".join(_EMPHASIS.sub("", plain).split())


def closing(text: str, start: int) -> int | None:
    """Where the brace that was opened before `start` is closed, or None."""
    depth = 1
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return i
    return None


def without(commands: tuple[str, ...], text: str, left: str = "", right: str = "") -> str:
    """`text` with the arguments of LaTeX commands, between `left` and `right`, in place of the commands."""
    opening = re.compile(rf"\\(?:{'|'.join(commands)})\s*\{{")
    start = 0
    while match := opening.search(text, start):
        end = closing(text, match.end())
        if end is None:
            start = match.end()
            continue
        text = f"{text[: match.start()]}{left}{text[match.end() : end]}{right}{text[end + 1 :]}"
        start = match.start()
    return text
