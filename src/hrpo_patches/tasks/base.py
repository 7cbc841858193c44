"""What a task is: where its problems are, how a row is read, how an answer is graded."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

from hrpo_patches.tasks.graders.numbers import is_number
from hrpo_thinking.errors import InputError

Row = dict[str, Any]
Grader = Callable[[str, str], bool]  # whether the second text, an answer, is right by the first, the gold one


class Problem(TypedDict):
    """A question, with all that a person would need to answer it, and the gold answers, any of which is right."""

    question: str
    answer: list[str]
    index: NotRequired[int]  # in the data set of a generator


GYM, PASSING = "reasoning_gym:", "passing"  # how the names of tasks begin that generate their problems
Reader = Callable[[Row], Problem]


class Unreadable(ValueError):
    """A row that a reader cannot make a problem of; the message completes "row 3 ..."."""


@dataclass(frozen=True)
class Task:
    """One kind of problem.

    Attributes:
        name: what it is called on the command line.
        train, test: data sets of the hub, each `ID[:CONFIG]@SPLIT`; a task that is only trained on, or only evaluated
            on, leaves one empty.
        shapes: how rows are read, by the columns that a row must have; the first shape that fits is taken.
        instruction: the zero-shot prompt, with {marker} where the answer marker goes; other braces are braces.
        examples: worked examples for a few-shot prompt, with {marker} once.
        grader: says whether an answer is right.
        retrieval: whether a question comes with documents, found in a corpus where the row has none.
    """

    name: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    shapes: dict[tuple[str, ...], Reader]
    instruction: str
    examples: tuple[str, ...]
    grader: Grader
    retrieval: bool = False

    def generated(self, split: str) -> list[Any] | None:
        """The problems of a task that makes its own, those of "test" others than those of "train"; else None.

        Raises:
            InputError: it cannot make them.
        """
        return None

    def read(self, row: Row, where: str) -> Problem:
        """The problem in a row.

        Args:
            row: of the data.
            where: names the row in errors.

        Raises:
            InputError: the row lacks a column (which it has, which it needs), or cannot be read.
        """
        for columns, reader in self.shapes.items():
            if all(_present(row, column) for column in columns):
                try:
                    problem = reader(row)
                    problem["question"].encode()  # JSON may hold half a surrogate pair, which no tokenizer takes
                except Unreadable as error:
                    raise InputError(f"{where} {error}.") from None
                except (ValueError, TypeError, AttributeError, LookupError) as error:
                    raise InputError(
                        f"{where} has columns of another form than a problem of {self.name}: {error}."
                    ) from None
                problem["answer"] = [gold for gold in problem["answer"] if gold.strip()]  # aliases may be blank
                if not problem["answer"]:
                    raise InputError(f"{where} has an empty answer.")
                return problem
        needs = ", or ".join(" and ".join(map(repr, columns)) for columns in self.shapes)
        has = sorted(column for column in row if _present(row, column))
        raise InputError(f"{where} has {has}, but a problem of {self.name} needs {needs}.")

    def lines(self, problem: Problem) -> int:
        """How many lines after the marker an answer may take: as many as the longest gold answer."""
        return max(len(gold.strip().splitlines()) for gold in problem["answer"])

    def is_right(self, problem: Problem, answer: str) -> bool:
        """Whether `answer` is one of the problem's gold answers."""
        return any(self.grader(gold, answer) for gold in problem["answer"])


def _present(row: Row, column: str) -> bool:
    value = row.get(column)
    return value is not None and str(value).strip() != ""


def text(row: Row, *columns: str) -> str:
    """The columns of a row as one text."""
    return " ".join(str(row[column]).strip() for column in columns)


def plain_number(value: object) -> str:
    """A number as people write it: 14.0 as 14, and 1_450 as 1450; an `Unreadable` if it is not one number."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    plain = re.sub(r"(?<=\d)_(?=\d)", "", str(value)).strip()
    if not is_number(plain):
        raise Unreadable(f"has the answer {plain!r}, which is not one number")
    return plain


def steps(like: str, do: str = "Solve the problem", answer: str = "the final answer alone") -> str:
    """An instruction to reason first: what to `do`, which `answer` to give, and what one looks `like`."""
    return f"{do} step by step. When you are done, write {{marker}} and then {answer}, like this: {{marker}} {like}"
