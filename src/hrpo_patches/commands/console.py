"""Runs a script's `main` for a person; knows errors, and imports nothing that a patch could refuse."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from hrpo_thinking.errors import InputError, NonFiniteError, PatchError


def train(argv: list[str] | None, task: str) -> dict[str, Any]:
    """`hrpo_patches.commands.train.main` for a script whose task is `task`, unless --task names another.

    Imported only now: after unsloth, where that is used, and so that errors of version are sentences.
    """
    from hrpo_patches.models.backends import start_backend, wanted_backend

    start_backend(wanted_backend(argv))
    from hrpo_patches.commands.train import main

    return main(argv, task)


def console(entry: Callable[[list[str] | None], Any], argv: list[str] | None = None) -> None:
    """Run `entry` for a person: what they can mend is one sentence and exit status 2, not a traceback."""
    try:
        entry(argv)
    except (InputError, NonFiniteError, PatchError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
