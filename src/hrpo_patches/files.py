"""Writes files and folders that are whole or not there, also after a kill."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout

from hrpo_thinking.errors import InputError

logger = logging.getLogger(__name__)

LOCK = ".lock"  # of the folder that a run writes to


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Within, an error of the system names this file, which a write does not know."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def replace(path: Path, write: str | Callable[[Path], object]) -> None:
    """Put a text, or what a function writes into the file that it is given, in the place of what is at `path`."""
    building = path.with_name(path.name + ".building")
    with _named(path):
        if callable(write):
            write(building)
        else:
            building.write_text(write)
        os.replace(building, path)


def create(path: Path, text: str) -> None:
    """Write a text to a file that is not there yet.

    Raises:
        InputError: another process has created one; the text is in a file beside it, which the message names.
    """
    building = path.with_name(path.name + ".whole")
    with _named(path):
        building.write_text(text)
    try:
        os.link(building, path)  # which replaces nothing
    except FileExistsError:
        raise InputError(
            f"{path} was created by another process while this one ran, and is not overwritten. The results are in "
            f"{building}; rename that file."
        ) from None
    building.unlink()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Within, no other process enters with the same folder, which is made if need be; after a kill, anyone may.

    Raises:
        InputError: another process is in, or the folder cannot be written to.
    """
    made, lock = not folder.exists(), FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"another run is writing to {folder}; wait for its end, or give another folder.") from None
    except OSError as error:
        raise InputError(f"{folder} cannot be written to: {error.strerror}.") from None
    except NotImplementedError:  # some network file systems
        logger.warning(f"{folder} is on a file system without locks: a second run there would not be noticed.")
    try:
        yield
    finally:
        if os.name == "posix":  # while it is held: afterwards it may be another's
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
        if made and not any(folder.iterdir()):
            folder.rmdir()


def missing(name: str, hub: str | None = None, known: tuple[str, ...] = ()) -> str | None:
    """What to say of a path that does not exist, with the nearest name that does; None if it exists.

    Args:
        name: a path; also a hub id, where `hub` says of what.
        hub: "model" or "dataset": a name that could be a hub id is a path only if there is a similar one, or its
            folder, on this machine, and the hub does not have it.
        known: names that stand for something without being a path.
    """
    path, local = Path(name), name.startswith((".", "/", "~")) or name.count("/") > 1
    try:
        if path.expanduser().exists():
            return None
        in_folder = path.parent.is_dir()
        beside = [one.name for one in path.parent.iterdir() if hub != "model" or one.is_dir()] if in_folder else []
    except (OSError, RuntimeError):  # no such user, a name that is too long, a folder that may not be read
        return f"{name} does not exist, or cannot be read."
    near = get_close_matches(path.name, [*beside, *(known if "/" not in name else ())], 1)
    if hub is not None and not local and (not (near or (in_folder and "/" in name)) or on_hub(name, hub)):
        return None
    return f"{name} does not exist{f'; did you mean {path.parent / near[0]}?' if near else '.'}"


@cache
def on_hub(name: str, kind: str) -> bool:
    """Whether the hub, or its cache here, has a "model" or "dataset" of this name; asks once, without retries."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.file_download import repo_folder_name

    if (Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind)).is_dir():
        return True
    try:
        HfApi().repo_info(name, repo_type=kind, timeout=5)
    except Exception:  # no connection, no such name: the errors are those of whichever HTTP library is used
        return False
    return True


def listed(folder: Path) -> list[list[object]]:
    """Name, size and time of each file in a folder: two lists are equal while nobody has changed one."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def append(path: Path, line: str) -> None:
    """Add a line to a file, in one call of the operating system."""
    with _named(path):
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, (line + "\n").encode())
        finally:
            os.close(file)


@contextmanager
def whole_or_nothing(destination: Path) -> Iterator[Path]:
    """A folder beside `destination` that takes its place at the end; an existing destination is an `InputError`."""
    if destination.exists():
        raise InputError(f"{destination} exists already; give a folder that does not.")
    destination.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=destination.parent, prefix=f".{destination.name}-"))
    try:
        yield building
        building.chmod(0o755)  # mkdtemp keeps others out
        building.rename(destination)
    finally:
        shutil.rmtree(building, ignore_errors=True)
