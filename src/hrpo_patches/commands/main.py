"""`hrpo`, and `python -m hrpo_patches`: the commands by name; imports each only when it is asked for.

So that a version that cannot be patched is a sentence, and unsloth can be imported before transformers.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from safetensors import SafetensorError

from hrpo_patches import __version__
from hrpo_patches.commands.flags import Written, split_backend, with_config
from hrpo_patches.models.backends import start_backend
from hrpo_thinking.errors import InputError, NonFiniteError, PatchError, SaveError

# What TRL, PEFT and transformers say of each other's names; whoever runs a command cannot do anything about it.
OLD_NAMES = r"`(is_)?gradient_checkpointing(_\w+)?` is deprecated and will be removed in v6\."
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def train(argv: Written | None = None, task: str = "gsm8k", prog: str = "hrpo train") -> dict[str, Any]:
    """Train from a command line, by default this process's; returns what `report.json` holds.

    Args:
        argv: the flags.
        task: where --task names none.
        prog: what the command is called in its help.

    Raises:
        InputError: before any training, if the run cannot work.
    """
    backend, words = split_backend(with_config(sys.argv[1:] if argv is None else argv))
    with ExitStack() as stack:
        if int(os.environ.get("RANK", 0)):  # of several processes, the first speaks
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        if not {"-h", "--help", "--help_all"} & set(words):
            backend = start_backend(backend)
        report: dict[str, Any] = import_module("hrpo_patches.commands.train").main(words, task, backend, prog)
    return report


def _in(module: str, name: str) -> Callable[[Written], Any]:
    return lambda argv: getattr(import_module(f"hrpo_patches.commands.{module}"), name)(argv)


evaluate = _in("eval", "main")

COMMANDS: dict[str, tuple[Callable[[Written], Any], str]] = {
    "train": (train, "train a model to think, by GRPO"),
    "sft": (_in("sft", "main"), "teach a model to think, from worked solutions, before it is rewarded"),
    "eval": (evaluate, "let a model answer a task's problems, and grade them"),
    "think": (_in("calls", "think"), "show one completion: each token's a, its residual's nearest words, the entropy"),
    "demo": (_in("demo", "main"), "show runs thinking, on a page in the browser, side by side and under controls"),
    "doctor": (_in("calls", "doctor"), "look whether machine, model, data and engine can think together"),
    "report": (_in("calls", "report"), "draw runs side by side into a PNG, and put them into a Markdown table"),
    "info": (_in("calls", "info"), "show what thinking adds to a model: parameters, multiply-adds a token"),
    "merge": (_in("calls", "merge"), "make a full model, which thinks by default, of an adapter and its base"),
    "push": (_in("push", "main"), "share an adapter or a full model on the hub"),
    "serve": (_in("serve", "main"), "serve a model that thinks, by vLLM and its OpenAI interface"),
    "convert": (_in("calls", "convert"), "make a published HRPO adapter (LoRA, gates, Lambda) say how it thinks"),
    "status": (_in("maintain", "status"), "show every patch and whether it is applied, fits, or is refused"),
    "lm_eval": (_in("calls", "lm_eval"), "lm-evaluation-harness, with the model `hrpo`, which thinks"),
    "checkout": (_in("maintain", "checkout"), "for maintainers: write the patched upstream files into a folder"),
    "refresh": (
        _in("maintain", "refresh"),
        "for maintainers: write the model families' diffs and the table of options",
    ),
}


def usage() -> str:
    """What `hrpo --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    head = (
        f"hrpo {__version__}: hybrid latent reasoning.\n\nusage: hrpo COMMAND ...      (hrpo COMMAND --help says more)"
    )
    return "\n".join([head, "", *lines])


def main(argv: Written | None = None) -> int:
    """Run one command (by default of this process's command line); returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        near = get_close_matches(argv[0], COMMANDS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(COMMANDS)}."
        print(f"error: unknown command {argv[0]!r}; {hint}", file=sys.stderr)
        return 2
    return exit_status(COMMANDS[argv[0]][0], argv[1:])


def exit_status(entry: Callable[[Written], Any], argv: Written | None = None) -> int:
    """Run `entry` for a person; an error that they can fix is one sentence and status 2, not a traceback.

    What the library logs is printed on stderr. Where that is a file or a pipe, no library redraws a bar in it.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # which tqdm reads when it is imported
    try:
        with _messages(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", OLD_NAMES, FutureWarning)
            status = entry(sys.argv[1:] if argv is None else argv)
    except (InputError, NonFiniteError, PatchError, SaveError) as error:
        _complain(str(error))
        return 2
    except Exception as error:
        if (why := no_room(error)) is None:
            raise
        _complain(f"{getattr(error, 'filename', None) or 'a file'} could not be written: {why}.")
        return 2
    return status if isinstance(status, int) else 0


def _complain(sentence: str) -> None:
    from tqdm import tqdm

    tqdm.write(f"error: {sentence}", file=sys.stderr)  # which makes room beside a bar


class _Printed(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        """Print a message beside the bars of others."""
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


@contextmanager
def _messages() -> Iterator[None]:
    """Within, what this package logs is printed; of several processes, the first prints."""
    logger, printed = logging.getLogger("hrpo_patches"), _Printed()
    level = logger.level
    logger.addHandler(printed)
    logger.setLevel(logging.ERROR if int(os.environ.get("RANK", 0)) else logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(printed)
        logger.setLevel(level)


def no_room(error: Exception) -> str | None:
    """What the system says of a disk that is full, if that is what this error is about, safetensors' own too."""
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return error.strerror
    found = isinstance(error, SafetensorError) and re.search(r"I/O error: (.*) \(os error (\d+)\)", str(error))
    return found[1] if found and int(found[2]) in NO_ROOM else None


def run() -> None:
    """The console script."""
    sys.exit(main())
