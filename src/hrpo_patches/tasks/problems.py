"""The problems of a task, from wherever they are."""

from __future__ import annotations

import random

from hrpo_patches.tasks import task_named
from hrpo_patches.tasks.base import GYM, PASSING, Problem, Task
from hrpo_patches.tasks.sources import task_rows
from hrpo_thinking.errors import InputError


def find_task(name: str, dataset: str | None, size: int = 10_000, seed: int = 42) -> Task:
    """The task to train or evaluate on; a data set `reasoning_gym:NAME` is a task of its own.

    Args:
        name: a task's name, `passing?option=value`, `reasoning_gym:NAME?option=value`, or `package.module:TASK`.
        dataset: where the problems are, if not in the task's own place.
        size, seed: of a generator.

    Raises:
        InputError: the task or generator is unknown.
    """
    passes = name.partition("?")[0] == PASSING
    if (passes or name.startswith(GYM)) and dataset is not None:
        raise InputError(f"{name} makes its own problems; remove --dataset {dataset}.")
    if passes:
        from hrpo_patches.tasks.passing import passing

        return passing(name, size, seed)
    if generators := [given for given in (dataset, name) if given is not None and given.startswith(GYM)]:
        from hrpo_patches.tasks.gym import gym_task

        return gym_task(generators[0], size, seed)
    return task_named(name)


def load_problems(
    task: Task, dataset: str | None = None, split: str = "train", corpus: str | None = None
) -> list[Problem]:
    """The problems of a task, each with a `question` and its gold answers.

    Args:
        task: reads the rows.
        dataset: a file, a folder or a hub id; by default the task's own on the hub.
        split: "train" or "test".
        corpus: a file or folder of documents, for questions that come without.

    Raises:
        InputError: the data is missing, empty, no JSON (which line), or a row cannot be read (which, and why).
    """
    if (generated := task.generated(split)) is not None:
        return generated
    rows = task_rows(task, dataset, split)
    problems = [task.read(row, where) for row, where in rows]
    if not task.retrieval:
        return problems
    from hrpo_patches.tasks.retrieval import with_retrieved

    return with_retrieved(problems, [row for row, _ in rows], corpus)


def split_held_out(problems: list[Problem], held_out: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """(train, held out): `held_out` distinct questions at random, none of which is left among the training problems.

    Raises:
        InputError: there are too few questions.
    """
    questions = sorted({problem["question"] for problem in problems})
    if held_out >= len(questions):
        raise InputError(
            f"{len(questions)} distinct questions are too few to hold {held_out} out and train on the rest."
        )
    chosen = set(random.Random(seed).sample(questions, held_out))
    by_question = {problem["question"]: problem for problem in problems}
    train = [problem for problem in problems if problem["question"] not in chosen]
    return train, [by_question[question] for question in sorted(chosen)]
