"""Problems with worked solutions: a question, its steps, each a line of text, and its answer.

A row holds `steps`, a list of texts, beside what its task needs, or an `answer` in GSM8K's form: a step per line, and
the answer after `####`. GSM8K's notes for a calculator (`<<6*3=18>>`) are removed.
"""

from __future__ import annotations

import re

from hrpo_patches.tasks.base import Problem, Row, Task
from hrpo_patches.tasks.gsm8k import GOLD_MARKER
from hrpo_patches.tasks.sources import task_rows
from hrpo_thinking.errors import InputError, require

_CALCULATION = re.compile(r"<<[^>]*>>")


class Worked(Problem):
    """A problem and its solution.

    Attributes:
        steps: of the solution, without the answer; each a text without line breaks at its ends.
    """

    steps: list[str]


def worked_problems(task: Task, dataset: str | None, split: str, marker: str) -> list[Worked]:
    """The problems of a task whose rows hold worked solutions.

    Args:
        task: reads the rows, and grades; one that makes its problems has them with their steps.
        dataset: a file, a folder or a hub id; by default the task's own on the hub.
        split: "train" or "test".
        marker: which no step may hold.

    Raises:
        InputError: the data is missing, or a row (which one) has no steps, or a step with the marker.
    """
    require(not task.retrieval, f"{task.name} asks about documents, which worked solutions do not come with here.")
    if (generated := task.generated(split)) is not None:
        for i, problem in enumerate(generated):
            require(
                "steps" in problem, f"{task.name} makes problems without steps; name worked solutions with --dataset."
            )
            _checked(problem, f"{task.name} problem {i}", marker)
        return generated
    return [
        _checked({**task.read(row, where), "steps": steps_of(row, where)}, where, marker)
        for row, where in task_rows(task, dataset, split)
    ]


def steps_of(row: Row, where: str) -> list[str]:
    """The steps in a row, which `where` names in errors.

    Raises:
        InputError: there are none, or they are not texts.
    """
    given = row.get("steps")
    if given is None:
        solution, marker, _ = str(row.get("answer", "")).rpartition(GOLD_MARKER)
        given = _CALCULATION.sub("", solution).splitlines() if marker else []
    require(
        isinstance(given, list) and all(isinstance(step, str) for step in given),
        f"{where}: expected 'steps' to be a list of texts, got {given!r}.",
    )
    steps = [" ".join(step.split()) for step in given]
    if steps := [step for step in steps if step]:
        return steps
    raise InputError(f"{where} has no steps: it needs 'steps', a list of texts, or an 'answer' with {GOLD_MARKER}.")


def _checked(problem: Worked, where: str, marker: str) -> Worked:
    solution = "".join(f"{step}\n" for step in problem["steps"])
    require(marker not in solution, f"{where} has a step with the answer marker {marker!r}: {solution!r}.")
    try:
        solution.encode()
    except UnicodeEncodeError:  # JSON may hold half a surrogate pair, which no tokenizer takes
        raise InputError(f"{where} has a step that is not valid UTF-8: {solution!r}.") from None
    return problem
