"""Says in a sentence what other libraries refuse while a trainer is built, and which flag it is about."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress

import torch

from hrpo_patches.commands.flags import Written
from hrpo_thinking.errors import InputError

# Whose checks of options these are. What is raised anywhere else, or is of another kind, is a bug and keeps its trace.
_REFUSALS = (ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError, OSError)
KINDS: dict[str, tuple[type[Exception], ...]] = {
    **dict.fromkeys(
        ("transformers", "peft", "accelerate", "datasets", "huggingface_hub"), (*_REFUSALS, NotImplementedError)
    ),
    "trl": (*_REFUSALS, RuntimeError),
    "torch": (ValueError,),
}
TRACE = "HRPO_TRACEBACK"  # which, set to 1, lets such an error pass


@contextmanager
def in_a_sentence(words: Written, own: Collection[str], building: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Within, an option that another library refuses is an `InputError`.

    Args:
        words: the command line.
        own: names of the flags that are not as other libraries have them.
        building: whether what fails now is still about options: no step has been taken.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        package = last.partition("site-packages/")[2].partition("/")[0]
        refused = isinstance(error, (ImportError, *KINDS.get(package, ())))
        refused = refused and not isinstance(error, torch.OutOfMemoryError)
        if not refused or not building() or os.environ.get(TRACE) == "1":
            raise
        message = " ".join(str(error).split())[:600].rstrip(".") or type(error).__name__
        flags = ", or ".join(flags_in(message, words, own)) or "an option of this run"
        raise InputError(f"{flags}: {package or 'python'} says: {message}. ({TRACE}=1 shows where.)") from None


def flags_in(message: str, words: Written, own: Collection[str]) -> list[str]:
    """The flags of a command line that a message is likely about.

    Those whose name is a word of it, or else a text in their value; or else, of those that are not our `own`, the ones
    whose number is in it, or all of them; or else of our own the ones whose number is in it.
    """
    given: dict[str, list[str]] = {}
    values: list[str] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            values = [value] if equals else []
            given[name] = values
        else:
            values.append(word)
    others = [name for name in given if name.removeprefix("--") not in own]
    hits = {name: [value for value in values if _has(message, value)] for name, values in given.items()}
    kinds = (
        [name for name in given if re.search(rf"\b{re.escape(name.removeprefix('--'))}\b", message)],
        [name for name, found in hits.items() if not all(map(_is_number, found))],
        [name for name in others if hits[name]],
        others,
        [name for name, found in hits.items() if found],
    )
    return [" ".join([name, *given[name]]) for name in next(filter(None, kinds), [])]


def _is_number(text: str) -> bool:
    with suppress(ValueError):
        float(text)
        return True
    return text.lower() in ("true", "false")


def _has(message: str, value: str) -> bool:
    """Whether a value stands in a message: a number also as a float, or any long word of a text that is not a path."""
    spelled = {value} | (set() if "/" in value else set(re.findall(r"[a-zA-Z_]{4,}", value)))
    with suppress(ValueError):
        spelled.add(str(float(value)))
    return any(re.search(rf"(?<![\w.-]){re.escape(one)}(?![\w.])", message.rstrip(".")) for one in spelled if one)
