"""The reward: 1 if the marker appears exactly once and the answer after it is right, else 0; knows text only.

Training and evaluation grade with the same function. Whether two answers are the same number or expression is
math-verify's to say.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any

from math_verify import parse, verify

_LONGEST = 200  # characters of an answer that are read
_TIMEOUT = 5  # seconds for one answer
_NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?(?:\s*/\s*\d+)?")

Reward = Callable[..., list[float]]


def answer_of(text: str, marker: str) -> str | None:
    """The first line after the marker, or None unless the marker appears exactly once."""
    parts = text.split(marker)
    if len(parts) != 2:
        return None
    return parts[1].strip().partition("\n")[0].strip()


def is_right(gold: str, answer: str) -> bool:
    """Whether `answer` equals `gold`, also in another notation ("1,000" and "1000", "1/2" and "0.5")."""
    if gold.strip() == answer.strip():
        return bool(gold.strip())
    # math-verify takes the last of several numbers, which "1 2 3 4 5 6 7" would exploit; LaTeX may hold several.
    if _NUMBER.search(gold) and "\\" not in answer and len(_NUMBER.findall(answer)) != 1:
        return False
    # math-verify's timeouts use signals, which only work in the main thread; the length keeps others from hanging.
    timeout = _TIMEOUT if threading.current_thread() is threading.main_thread() else None
    parsed_gold, parsed = (parse(text[:_LONGEST], parsing_timeout=timeout) for text in (gold, answer))
    return bool(parsed_gold and parsed) and bool(verify(parsed_gold, parsed, timeout_seconds=timeout))


def grade(completion: str, gold: str, marker: str) -> float:
    """1.0 if `completion` carries the marker exactly once and the answer after it is right, else 0.0."""
    answer = answer_of(completion, marker)
    return float(bool(answer) and is_right(gold, answer or ""))


def completion_text(completion: str | list[dict[str, Any]]) -> str:
    """The text of a completion as TRL hands it to rewards: plain, or the last message of a conversation."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def answer_reward(marker: str) -> Reward:
    """A TRL reward function over the data's `answer` column."""

    def answer_is_right(completions: list, answer: list[str], **_: Any) -> list[float]:
        return [grade(completion_text(c), gold, marker) for c, gold in zip(completions, answer, strict=True)]

    return answer_is_right
