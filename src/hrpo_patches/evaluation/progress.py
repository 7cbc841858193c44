"""Keeps what an evaluation has done so far, so that it can be stopped and taken up again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hrpo_patches.files import append
from hrpo_thinking.errors import InputError


class Progressed:
    """What an evaluation has done so far, in a file beside its results: the settings, then a line for each batch.

    Raises:
        InputError: the file is damaged, in use, or belongs to an evaluation with other settings.
    """

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        self.path = out.with_name(out.name + ".part")
        self._lock = FileLock(self.path.with_name(self.path.name + ".lock"))  # held until the process ends
        try:
            self._lock.acquire(timeout=0)
            self.path.touch()
        except Timeout:
            raise InputError(f"another evaluation is writing {self.path}; wait, or give another --out.") from None
        except OSError as error:
            raise InputError(f"{out} cannot be written: {error.strerror}.") from None
        lines = self.path.read_text(errors="replace").splitlines(keepends=True)
        complete = [line for line in lines if line.endswith("\n")]  # a kill may cut the last one
        try:
            before, *batches = [json.loads(line) for line in complete] or [settings]
        except ValueError as error:
            raise InputError(f"{self.path} is damaged ({error}); remove it, or give another --out.") from None
        if before != settings:
            other = sorted(key for key in settings if not isinstance(before, dict) or before.get(key) != settings[key])
            raise InputError(
                f"{self.path} belongs to another evaluation (other {', '.join(other)}); give another --out, or remove "
                f"it."
            )
        self.batches: list[list[dict[str, Any]]] = batches
        self.path.write_text("".join(complete) or json.dumps(settings) + "\n")

    def add(self, samples: list[dict[str, Any]]) -> None:
        """Write one batch's samples, in one call of the operating system."""
        self.batches.append(samples)
        append(self.path, json.dumps(samples))

    def remove(self) -> None:
        """Remove the file: the evaluation is done."""
        self.path.unlink(missing_ok=True)
        self._lock.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)
