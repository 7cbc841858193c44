"""Says in a sentence what other libraries refuse while a trainer is built, and which flag it is about."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from hrpo_patches.commands.flags import Written
from hrpo_patches.commands.train_flags import own_flags
from hrpo_thinking.errors import InputError

# Whose checks of options these are. What is raised anywhere else, or is of another kind, is a bug and keeps its trace.
KINDS: dict[str, tuple[type[Exception], ...]] = {
    **dict.fromkeys(
        ("trl", "transformers", "peft", "accelerate", "datasets", "huggingface_hub"),
        (ValueError, TypeError, KeyError, AttributeError, AssertionError, NotImplementedError, OSError),
    ),
    "torch": (ValueError,),
}
TRACE = "HRPO_TRACEBACK"  # which, set to 1, lets such an error pass


@contextmanager
def in_a_sentence(words: Written, building: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Within, an option that another library refuses is an `InputError`.

    Args:
        words: the command line.
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
        if not refused or not building() or os.environ.get(TRACE) == "1":
            raise
        message = " ".join(str(error).split())[:600].rstrip(".") or type(error).__name__
        flags = ", ".join(flags_in(message, words)) or "an option of this run"
        raise InputError(f"{flags}: {package or 'python'} says: {message}. ({TRACE}=1 shows where.)") from None


def flags_in(message: str, words: Written) -> list[str]:
    """The flags of a command line that a message is likely about.

    Those whose name is in it, or else of other libraries' flags those whose value is, or all of them, or else of ours.
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
    shown = {name: " ".join([name, *values]) for name, values in given.items()}
    others = [name for name in given if name.removeprefix("--") not in own_flags()]
    valued = [name for name, values in given.items() if any(_has(message, value) for value in values)]
    kinds = (
        [name for name in given if name.removeprefix("--") in message],
        [name for name in valued if name in others],
        others,
        valued,
        given,
    )
    return [shown[name] for name in next(filter(None, kinds), [])]


def _has(message: str, value: str) -> bool:
    """Whether a value stands in a message, a number also as a float."""
    spelled = {value, value.strip("[]'\"")}
    with suppress(ValueError):
        spelled.add(str(float(value)))
    return any(re.search(rf"(?<![\w.-]){re.escape(one)}(?![\w.])", message.rstrip(".")) for one in spelled if one)
