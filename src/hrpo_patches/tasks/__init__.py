"""The tasks that models are trained and evaluated on, by name. A task's module is imported when it is asked for."""

from __future__ import annotations

import os
import sys
from difflib import get_close_matches
from importlib import import_module

from hrpo_patches.tasks.base import Problem, Task
from hrpo_thinking.errors import InputError

TASKS = {  # module:NAME of each
    "gsm8k": "hrpo_patches.tasks.gsm8k:TASK",
    "svamp": "hrpo_patches.tasks.gsm8k:SVAMP",
    "mawps": "hrpo_patches.tasks.gsm8k:MAWPS",
    "math": "hrpo_patches.tasks.math:TASK",
    "mmlu": "hrpo_patches.tasks.mmlu:MMLU",
    "arc_challenge": "hrpo_patches.tasks.mmlu:ARC",
    "rag": "hrpo_patches.tasks.qa:RAG",
    "nq": "hrpo_patches.tasks.qa:NQ",
    "triviaqa": "hrpo_patches.tasks.qa:TRIVIAQA",
    "hotpotqa": "hrpo_patches.tasks.qa:HOTPOTQA",
    "2wikimultihopqa": "hrpo_patches.tasks.qa:WIKI",
    "bamboogle": "hrpo_patches.tasks.qa:BAMBOOGLE",
}

__all__ = ["TASKS", "Problem", "Task", "task_named"]


def task_named(name: str) -> Task:
    """The task of this name, or `package.module:NAME`, your own `Task`, importable.

    Raises:
        InputError: the task is unknown; the message has the nearest names.
    """
    if ":" in name:
        if not {"", os.getcwd()} & set(sys.path):  # as `python -m` would have it
            sys.path.append(os.getcwd())
        return _imported(name)
    if name not in TASKS:
        near = get_close_matches(name.lower(), TASKS, n=3, cutoff=0.4)
        hint = (
            f"did you mean {' or '.join(near)}?"
            if near
            else f"there are {', '.join(sorted(TASKS))}, reasoning_gym:NAME, and package.module:TASK."
        )
        raise InputError(f"unknown task {name!r}; {hint}")
    return _imported(TASKS[name])


def _imported(name: str) -> Task:
    module, _, attribute = name.partition(":")
    try:
        task = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise InputError(f"the task {name!r} could not be imported: {error}.") from None
    if not isinstance(task, Task):
        raise InputError(f"{name} is a {type(task).__name__}, and must be a hrpo_patches.tasks.Task.")
    return task
