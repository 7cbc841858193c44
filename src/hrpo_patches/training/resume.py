"""Finds the checkpoint that a run is resumed from; knows the files of a checkpoint, nothing of models."""

from __future__ import annotations

import json
from pathlib import Path


def last_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run; a save that was cut short is passed over, which is said."""
    numbered = [path for path in run.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(numbered, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text())  # the last file that a save writes
            return path
        except (OSError, ValueError):
            print(f"{path} is incomplete, as a save that was cut short leaves it: passed over.")
    return None
