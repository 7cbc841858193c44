"""The tasks that models are trained and evaluated on, by name."""

from __future__ import annotations

import os
import sys
from difflib import get_close_matches
from importlib import import_module

from hrpo_patches.tasks import gsm8k, math, mmlu, qa
from hrpo_patches.tasks.base import Problem, Task
from hrpo_thinking.errors import InputError

TASKS: dict[str, Task] = {
    task.name: task for task in (gsm8k.TASK, gsm8k.SVAMP, gsm8k.MAWPS, math.TASK, mmlu.MMLU, mmlu.ARC, *qa.TASKS)
}

__all__ = ["TASKS", "Problem", "Task", "task_named"]


def task_named(name: str) -> Task:
    """The task of this name, or `package.module:NAME`, your own `Task`, importable.

    Raises:
        InputError: the task is unknown; the message has the nearest names.
    """
    if ":" in name:
        return _imported(name)
    if name not in TASKS:
        near = get_close_matches(name.lower(), TASKS, n=3, cutoff=0.4)
        hint = (
            f"did you mean {' or '.join(near)}?"
            if near
            else f"there are {', '.join(sorted(TASKS))}, reasoning_gym:NAME, and package.module:TASK."
        )
        raise InputError(f"unknown task {name!r}; {hint}")
    return TASKS[name]


def _imported(name: str) -> Task:
    module, _, attribute = name.partition(":")
    if not {"", os.getcwd()} & set(sys.path):  # as `python -m` would have it
        sys.path.append(os.getcwd())
    try:
        task = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise InputError(f"the task {name!r} could not be imported: {error}.") from None
    if not isinstance(task, Task):
        raise InputError(f"{name} is a {type(task).__name__}, and must be a hrpo_patches.tasks.Task.")
    return task
