"""Tasks of reasoning-gym, `reasoning_gym:NAME?option=value&...`: problems made on the spot, graded by their maker."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import parse_qsl

import yaml

from hrpo_patches.errors import InputError
from hrpo_patches.graders import number
from hrpo_patches.tasks.base import Problem, Row, Task, text
from hrpo_patches.tasks.gsm8k import TASK as GSM8K

PREFIX = "reasoning_gym:"
_DECIMAL = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?")


class GymProblem(Problem):
    """A problem, and its number in the generator's data set."""

    index: int


@dataclass(frozen=True)
class GymTask(Task):
    """A task whose problems come from a generator and are graded by it; plain numbers also in other notations."""

    data: Any = None

    def is_right(self, problem: Problem, answer: str) -> bool:
        """Whether the generator gives `answer` its full score, or it is the same plain number."""
        (gold,) = problem["answer"]
        if _DECIMAL.fullmatch(gold):
            return number(gold, answer)
        try:
            return bool(self.data.score_answer(answer, self.data[cast(GymProblem, problem)["index"]]) >= 1)
        except Exception:  # generators read answers each in their own way
            return False

    def problems(self) -> list[Problem]:
        """All problems of the data set."""
        return [
            cast(Problem, self.read(row, f"{self.name} problem {i}") | {"index": i}) for i, row in enumerate(self.data)
        ]


def _read(row: Row) -> Problem:
    return {"question": text(row, "question"), "answer": [str(row["answer"]).strip()]}


def gym_task(name: str, size: int, seed: int) -> GymTask:
    """The task `reasoning_gym:NAME?options`, with `size` problems.

    Raises:
        InputError: reasoning-gym is not installed, or does not know the name or an option.
    """
    try:
        import reasoning_gym
    except ImportError:
        raise InputError(
            "reasoning_gym:... needs reasoning-gym; run: pip install 'hrpo_patches[quickstart]'"
        ) from None
    generator, _, query = name.removeprefix(PREFIX).partition("?")
    try:
        options = {key: yaml.safe_load(value) for key, value in parse_qsl(query, keep_blank_values=True)}
        data = reasoning_gym.create_dataset(generator, size=size, seed=seed, **options)
    except (ValueError, TypeError, AssertionError, yaml.YAMLError) as error:
        raise InputError(f"reasoning-gym cannot make {generator!r}: {str(error).splitlines()[0]}.") from None
    fields = {field.name: getattr(GSM8K, field.name) for field in dataclasses.fields(Task)}
    changed = {"name": f"{PREFIX}{generator}", "train": (), "test": (), "shapes": {("question", "answer"): _read}}
    return GymTask(**fields | changed, data=data)
