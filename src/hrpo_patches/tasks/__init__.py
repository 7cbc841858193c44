"""The tasks that models are trained and evaluated on, by name; each file here knows one family."""

from __future__ import annotations

from difflib import get_close_matches

from hrpo_patches.errors import InputError
from hrpo_patches.tasks import gsm8k, math, mawps, mmlu, qa, svamp
from hrpo_patches.tasks.base import Problem, Task

TASKS: dict[str, Task] = {
    task.name: task for task in (gsm8k.TASK, math.TASK, mawps.TASK, mmlu.MMLU, mmlu.ARC, svamp.TASK, *qa.TASKS)
}

__all__ = ["TASKS", "Problem", "Task", "task_named"]


def task_named(name: str) -> Task:
    """The task of this name.

    Raises:
        InputError: there is none; the message has the nearest names.
    """
    if name not in TASKS:
        near = get_close_matches(name.lower(), TASKS, n=3, cutoff=0.4)
        hint = (
            f"did you mean {' or '.join(near)}?"
            if near
            else f"there are {', '.join(sorted(TASKS))}, and reasoning_gym:NAME."
        )
        raise InputError(f"there is no task {name!r}; {hint}")
    return TASKS[name]
