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
        InputError: the file belongs to an evaluation with other settings, or is damaged.

    Attributes:
        batches: the samples of each batch so far.
    """

    batches: list[list[dict[str, Any]]]

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
        header, *self.batches = [self._read(number, line) for number, line in enumerate(complete, 1)] or [settings]
        if other := sorted(name for name in settings if header.get(name) != settings[name]):
            raise InputError(
                f"{self.path} belongs to another evaluation (other {', '.join(other)}); give another --out, or remove "
                f"the file."
            )
        self.path.write_text("".join(complete) or json.dumps(settings) + "\n")

    def _read(self, number: int, line: str) -> Any:
        """What a line holds: the settings in the first, in others a list of samples."""
        try:
            content = json.loads(line)
        except ValueError:
            content = None
        if not isinstance(content, dict if number == 1 else list):
            raise InputError(
                f"line {number} of {self.path} is not what an evaluation writes there: the file is damaged. Remove it "
                f"to begin again, or give another --out."
            )
        return content

    def add(self, samples: list[dict[str, Any]]) -> None:
        """Write one batch's samples, in one call of the operating system."""
        self.batches.append(samples)
        append(self.path, json.dumps(samples))

    def remove(self) -> None:
        """Remove the file: the evaluation is done."""
        self.path.unlink(missing_ok=True)
        self._lock.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)
