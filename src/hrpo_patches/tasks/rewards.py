"""The reward: 1 if the marker appears exactly once and the answer after it is right, else 0.

Training and evaluation grade with the same function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from hrpo_patches.tasks.base import Problem, Task

Reward = Callable[..., list[float]]


def answer_of(text: str, marker: str, lines: int = 1) -> str | None:
    """The first line after the marker, or the first `lines`; None unless the marker appears exactly once."""
    parts = text.split(marker)
    if len(parts) != 2:
        return None
    return "\n".join(parts[1].strip().split("\n")[:lines]).strip()


def grade(task: Task, problem: Problem, completion: str, marker: str) -> float:
    """1.0 if `completion` carries the marker exactly once and the answer after it is right, else 0.0."""
    answer = answer_of(completion, marker, task.lines(problem))
    return float(bool(answer) and task.is_right(problem, answer or ""))


def completion_text(completion: str | list[dict[str, Any]], marker: str) -> str:
    """The text of a completion as TRL hands it to rewards: plain, or the last message of a conversation.

    Of a tokenizer that tells reasoning and content apart at the marker, the message has the two without it.
    """
    if isinstance(completion, str):
        return completion
    message = completion[-1]
    reasoning = message.get("reasoning_content")
    return f"{reasoning}{marker}{message.get('content')}" if reasoning is not None else str(message["content"])


def answer_reward(task: Task, marker: str) -> Reward:
    """A TRL reward function over the data's columns: 1 for a right answer."""

    def answer_is_right(completions: list, **columns: Any) -> list[float]:
        rows = {name: values for name, values in columns.items() if name in ("question", "answer", "index")}
        problems = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
        return [
            grade(task, cast(Problem, problem), completion_text(completion, marker), marker)
            for problem, completion in zip(problems, completions, strict=True)
        ]

    return answer_is_right


def format_reward(marker: str) -> Reward:
    """A TRL reward function: 1 for a completion with the marker exactly once and something after it."""

    def answer_has_its_format(completions: list, **_: object) -> list[float]:
        return [float(bool(answer_of(completion_text(completion, marker), marker))) for completion in completions]

    return answer_has_its_format
