"""Tasks of reasoning-gym, `reasoning_gym:NAME?option=value&...`: problems made on the spot.

Many of its generators grade an answer by evaluating it as Python, with whatever it calls. So they are asked only about
texts that cannot call anything, where the gold answer is such a text too; other answers must be the gold answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Any
from urllib.parse import parse_qsl

import yaml

from hrpo_patches.extras import require_package
from hrpo_patches.tasks.base import GYM, Problem, Row, Task, text
from hrpo_patches.tasks.graders.numbers import number
from hrpo_patches.tasks.gsm8k import TASK as GSM8K
from hrpo_thinking.errors import InputError

_DECIMAL = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?")
# Formulas without powers, and lists without multiplication: nothing to call, and nothing that fills the memory.
_HARMLESS = re.compile(r"(?:[\s0-9+\-/().=]|\*(?!\s*\*))*|(?:[\s0-9+\-/(),.;:|#>=\[\]]|<(?!<))*", re.ASCII)
_LONGEST = 1000  # characters


@dataclass(frozen=True)
class GymTask(Task):
    """A task whose problems come from a generator, which grades what is harmless; plain numbers in any notation."""

    data: Any = None

    @cached_property
    def rows(self) -> list[Row]:
        """The generator's problems, made once.

        Raises:
            InputError: it cannot make one.
        """
        try:
            return list(self.data)
        except (ValueError, TypeError, AssertionError, IndexError) as error:
            raise InputError(f"{self.name} cannot make a problem with these options: {error}.") from None

    def is_right(self, problem: Problem, answer: str) -> bool:
        """Whether `answer` is the gold answer, the same plain number, or has the generator's full score."""
        (gold,) = problem["answer"]
        if _DECIMAL.fullmatch(gold):
            return number(gold, answer)
        if answer.casefold().split() == gold.casefold().split():
            return True
        if len(answer) > _LONGEST or not (_HARMLESS.fullmatch(answer) and _HARMLESS.fullmatch(gold)):
            return False
        try:
            return bool(self.data.score_answer(answer, self.rows[problem["index"]]) >= 1)
        except Exception:  # generators read answers each in their own way
            return False

    def generated(self, split: str) -> list[Any]:
        """All problems of the data set, of either split: its seed tells them apart.

        Raises:
            InputError: they have no gold answers to grade by.
        """
        if any(row["answer"] is None for row in self.rows):
            raise InputError(f"{self.name} has problems without a gold answer, which cannot be graded here.")
        return [{**self.read(row, f"{self.name} problem {i}"), "index": i} for i, row in enumerate(self.rows)]


def _read(row: Row) -> Problem:
    return {"question": text(row, "question"), "answer": [str(row["answer"]).strip()]}


def gym_task(name: str, size: int, seed: int) -> GymTask:
    """The task `reasoning_gym:NAME?options`, with `size` problems.

    Raises:
        InputError: reasoning-gym is not installed, or does not know the name or an option.
    """
    require_package("reasoning_gym", name)
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    generator, _, query = name.removeprefix(GYM).partition("?")
    if generator not in DATASETS:
        near = get_close_matches(generator, DATASETS, n=3, cutoff=0.4) or sorted(DATASETS)
        raise InputError(f"reasoning-gym has no generator {generator!r}; there are {', '.join(near)}.")
    try:
        options = {key: yaml.safe_load(value) for key, value in parse_qsl(query, keep_blank_values=True)}
        data = reasoning_gym.create_dataset(generator, size=size, seed=seed, **options)
    except (ValueError, TypeError, AssertionError, yaml.YAMLError) as error:
        raise InputError(f"reasoning-gym cannot make {generator!r}: {str(error).splitlines()[0]}.") from None
    changed = {"name": f"{GYM}{generator}", "train": (), "test": (), "shapes": {("question", "answer"): _read}}
    return GymTask(**vars(GSM8K) | changed, data=data)
