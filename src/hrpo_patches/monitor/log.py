"""A run's log as JSON lines, whole also after a kill."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hrpo_patches.files import append, replace
from hrpo_thinking.errors import InputError

LOG_FILE = "monitor.jsonl"

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows of a log. A last line without its end, which a power failure can leave, is skipped.

    Raises:
        InputError: a line is no JSON object.
    """
    whole, newline, _ = path.read_text().rpartition("\n")
    rows = []
    for number, line in enumerate(whole.split("\n") if newline else [], 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            raise InputError(f"line {number} of {path} is no JSON object: the file is damaged.") from None
    return rows


def _plain(value: object) -> Any:
    value = value.item() if hasattr(value, "item") else value  # of torch or numpy
    return None if isinstance(value, float) and not math.isfinite(value) else value  # JSON has no NaN


class RunLog:
    """`monitor.jsonl` in a run's folder: one object a line, each with its "step"; the first says what the run is."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOG_FILE

    def begin(self, step: int, header: Row, history: Sequence[Row] = ()) -> None:
        """Start the log, or resume it after `step`: later rows belong to steps that are taken again.

        Args:
            step: the last one that was taken; 0 starts a log.
            header: what the run is.
            history: rows of the checkpoint that the run is resumed from; those of the log must be the same.

        Raises:
            InputError: the log that is there is another run's.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_rows(self.path) if row["step"] <= step] if self.path.exists() else []
        own = {row["step"]: row["loss"] for row in history if "loss" in row}
        others = [row for row in kept if "loss" in row and _plain(own.get(row["step"], row["loss"])) != row["loss"]]
        if self.path.exists() and (step == 0 or others):
            raise InputError(f"{self.path} holds another run's log; give another output_dir, or move it away.")
        rows = kept or [{"step": 0, "run": header}]
        replace(self.path, "".join(self._line(row) + "\n" for row in rows))

    def write(self, row: Row) -> None:
        """Append one row, in one call of the operating system."""
        append(self.path, self._line(row))

    @staticmethod
    def _line(row: Row) -> str:
        return json.dumps({key: _plain(value) for key, value in row.items()}, allow_nan=False)
