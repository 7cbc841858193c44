"""Reads the rows of a data set, from a file, a folder or the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import load_dataset

from hrpo_patches.files import missing
from hrpo_patches.tasks.base import Task
from hrpo_thinking.errors import InputError

Rows = Iterator[tuple[dict[str, Any], str]]


def json_rows(path: Path) -> Rows:
    """The objects of a `.jsonl` file, each with its line's name; an `InputError` names the line that is none."""
    with path.open("rb") as lines:  # bytes split at newlines only, not at U+2028 and its kin
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path} is not JSON on line {number}: {error.msg}.") from None
            except UnicodeDecodeError:
                raise InputError(f"{path} is not UTF-8 on line {number}.") from None
            except (ValueError, RecursionError) as error:  # a number of too many digits, too many brackets
                raise InputError(f"{path} cannot be read on line {number}: {error}.") from None
            if not isinstance(row, dict):
                raise InputError(f"{path} line {number} is not a JSON object.")
            yield row, f"{path} line {number}"


def _hub_rows(source: str, split: str) -> Rows:
    name, _, own_split = source.partition("@")
    identifier, _, config = name.partition(":")
    split = own_split or split
    try:
        data = load_dataset(identifier, config or None, split=split)
    except Exception as error:  # the hub, its cache and its readers have errors of their own
        raise InputError(
            f"the data set {source!r} could not be loaded ({' '.join(str(error).split())}); a path must end in "
            f".jsonl, or be a folder with train.jsonl and test.jsonl."
        ) from None
    return ((dict(row), f"{name}[{split}] row {i}") for i, row in enumerate(data))


def sources_of(task: Task, dataset: str | None, split: str) -> tuple[str, ...]:
    """Where the rows of a task are: the data set, or the task's own for "train" or "test", which may be none."""
    return (dataset,) if dataset is not None else task.train if split == "train" else task.test


def task_rows(task: Task, dataset: str | None, split: str) -> list[tuple[dict[str, Any], str]]:
    """All rows of a task, each with a name for errors.

    Raises:
        InputError: as `rows_of`; or there are none.
    """
    sources = sources_of(task, dataset, split)
    rows = [pair for source in sources for pair in rows_of(source, split)]
    if not rows:
        none = f"the data set {', '.join(sources)} has no rows" if sources else f"{task.name} has no {split} data"
        raise InputError(f"{none}; name some with --dataset.")
    return rows


def place_of(source: str, split: str) -> str:
    """One name for the rows of a data set: the path of their file, or `ID[:CONFIG]@SPLIT` on the hub."""
    path = Path(source)
    file = path / f"{split}.jsonl" if path.is_dir() else path
    if file.exists():
        return str(file.resolve())
    return source if "@" in source else f"{source}@{split}"


def rows_of(source: str, split: str) -> Rows:
    """The rows of a data set, each with a name for errors.

    Args:
        source: a `.jsonl` file, a folder with `train.jsonl` and `test.jsonl`, or a hub id, `ID[:CONFIG][@SPLIT]`.
        split: which part, where the source does not say.

    Raises:
        InputError: the data is missing, or a line is no JSON object.
    """
    path = Path(source)
    if path.is_dir():
        path = path / f"{split}.jsonl"
    if path.suffix not in (".jsonl", ".json") and not path.exists():
        if absent := missing(source.partition("@")[0].partition(":")[0], "dataset"):
            raise InputError(f"the data set {absent}")
        return _hub_rows(source, split)
    if not path.is_file():
        raise InputError(f"the data file {missing(str(path)) or f'{path} is a folder.'}")
    return json_rows(path)
