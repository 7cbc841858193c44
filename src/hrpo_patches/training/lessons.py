"""Supervised batches: worked solutions as tokens, whose first steps are replaced by forced thoughts.

At stage c a completion is c * k thoughts, the steps from the c-th on, and the answer behind its marker. It has as many
thoughts where a solution has fewer steps, so that a rollout needs to know one number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hrpo_thinking.errors import InputError
from hrpo_thinking.request import ThinkingRequest

IGNORED = -100  # labels that are not learned


@dataclass(frozen=True)
class Lesson:
    """A worked solution as token ids.

    Attributes:
        prompt: of the question.
        steps: each with the line break behind it.
        answer: marker, answer and end token.
    """

    prompt: list[int]
    steps: list[list[int]]
    answer: list[int]


def lesson_of(
    tokenizer: PreTrainedTokenizerBase, prompt: list[int], steps: Sequence[str], answer: str, marker: str
) -> Lesson:
    """The lesson of a solution; `prompt` as token ids, the rest as text.

    Raises:
        InputError: the tokenizer has no end token.
    """
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end token, which every completion ends with; set tokenizer.eos_token.")

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    return Lesson(prompt, [ids(f"{step}\n") for step in steps], [*ids(f"{marker} {answer}"), tokenizer.eos_token_id])


@dataclass(frozen=True)
class LessonBatch:
    """A batch of lessons at one stage: prompts padded on the left, completions on the right.

    Attributes:
        input_ids, attention_mask: (B, L).
        labels: (B, K), the completions' tokens, `IGNORED` at thoughts and padding.
        thinking: (B, K) bool, which completion tokens think.
        following: (B, K) bool, the tokens of what directly follows the thoughts: a step, or the answer.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    thinking: Tensor
    following: Tensor

    @property
    def width(self) -> int:
        """K, the columns of the completions."""
        return self.labels.shape[1]


class Classroom:
    """Makes batches of lessons.

    Args:
        filler: the token id of a thought.
        per_step: k, the thoughts that replace a step.
        padding: the token id of padding.
        table: the automaton that ends the thinking (`marker.thinking_table`); None where nothing thinks.
    """

    def __init__(self, filler: int, per_step: int, padding: int, table: Tensor | None) -> None:
        self.filler, self.per_step, self.padding = filler, per_step, padding
        self.table = table.numpy() if table is not None else None

    def thoughts(self, stage: int) -> int:
        """The forced thoughts of a completion at this stage."""
        return stage * self.per_step

    def completion(self, lesson: Lesson, stage: int) -> list[int]:
        """The tokens that follow the prompt, forced thoughts first."""
        written = [token for step in lesson.steps[stage:] for token in step]
        return [self.filler] * self.thoughts(stage) + written + lesson.answer

    def thinks(self, completion: list[int], stage: int) -> list[bool]:
        """Which of a completion's tokens think, as in a rollout of the same tokens."""
        if self.table is None:
            return [False] * len(completion)
        request = ThinkingRequest(self.table, self.thoughts(stage))
        return [request.read(index, token) for index, token in enumerate(completion)]

    def batch(self, lessons: Sequence[Lesson], stage: int) -> LessonBatch:
        """The lessons at one stage."""
        completions = [self.completion(lesson, stage) for lesson in lessons]
        forced, before = self.thoughts(stage), max(len(lesson.prompt) for lesson in lessons)
        width = max(map(len, completions))
        # Prompts end, and completions begin, at column `before`.
        ids = torch.full((len(lessons), before + width), self.padding)
        seen, labels = torch.zeros_like(ids), torch.full((len(lessons), width), IGNORED)
        thinking = torch.zeros(len(lessons), width, dtype=torch.bool)
        following = torch.zeros_like(thinking)
        for row, (lesson, completion) in enumerate(zip(lessons, completions, strict=True)):
            start, end = before - len(lesson.prompt), before + len(completion)
            ids[row, start:end] = torch.tensor(lesson.prompt + completion)
            seen[row, start:end] = 1
            # Labels stand at the tokens themselves; forced thoughts are given, not learned.
            labels[row, forced : len(completion)] = torch.tensor(completion[forced:])
            thinking[row, : len(completion)] = torch.tensor(self.thinks(completion, stage))
            # The step that the last thought leads to; it alone shows whether the thoughts are read.
            following[row, forced : forced + len((*lesson.steps[stage:], lesson.answer)[0])] = True
        return LessonBatch(ids, seen, labels, thinking, following)
