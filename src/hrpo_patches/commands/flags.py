"""Reads a command line and its YAML file into dataclasses by TRL's parser, once.

Importing this imports neither torch nor transformers: `--backend` is read before them, as unsloth requires.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from dataclasses import field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hrpo_patches.files import missing
from hrpo_patches.models.backends import BACKENDS
from hrpo_thinking.config import OPTIONS, ThinkingConfig
from hrpo_thinking.errors import InputError

if TYPE_CHECKING:
    from trl import TrlParser

Written = list[str]  # words of a command line
TRACKERS = {
    "help": "Where the log goes, beside monitor.jsonl; several may be given.",
    "choices": ("none", "tensorboard", "wandb", "trackio"),
}


def option(default: object, text: str, **metadata: object) -> Any:
    """A dataclass field that is a flag, with its help and whatever argparse takes (`choices`, `aliases`)."""
    return field(default=default, metadata={"help": text} | metadata)


def published(kind: type, name: str, default: object, *aliases: str) -> Any:
    """A field of the dataclass `kind` with another default, and the names that the published scripts have for it."""
    (one,) = [one for one in fields(kind) if one.name == name]
    text = str(one.metadata["help"]).replace(" (default)", "")  # which is another one here
    more = {"aliases": list(aliases)} if aliases else {}
    return field(default=default, metadata=dict(one.metadata) | {"help": text} | more)


def add_thinking_flags(parser: argparse.ArgumentParser, names: Iterable[str], **defaults: object) -> None:
    """Give a parser the flags of these options of ThinkingConfig; `defaults` are in the place of its own."""
    group = parser.add_argument_group("how the model thinks")
    for name in names:
        one, default = OPTIONS[name], defaults.get(name, getattr(ThinkingConfig, name))
        flags = [f"--{name}", *([f"--{one.published}"] if one.published else [])]
        switch: dict[str, Any] = {"nargs": "?", "const": True} if one.kind is bool else {}
        kind = switch_of if one.kind is bool else one.kind
        group.add_argument(*flags, type=kind, default=default, choices=one.choices, help=one.help, **switch)


def switch_of(text: str) -> bool:
    """A flag's true or false, for argparse."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def read_yaml(path: Path) -> dict[str, Any]:
    """The options in a YAML file, by the name of their flag; an `InputError` if it holds none."""
    try:
        if absent := missing(str(path)):
            raise InputError(f"--config {absent}")
        options = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"--config {path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(options, dict) or not all(isinstance(key, str) for key in options):
        raise InputError(f"--config {path} must hold options, one `name: value` a line.")
    return options


def as_words(options: dict[str, Any]) -> Written:
    """Options of a YAML file as words of a command line, so that one parser reads and checks both."""
    words = []
    for name, value in options.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            text = json.dumps(value) if isinstance(value, (bool, dict)) else str(value)
            words.append(f"--{name}={text}")
    return words


def with_config(argv: Written) -> Written:
    """A command line with the options of its `--config FILE.yaml` before its own flags, which win.

    Raises:
        InputError: the file cannot be read.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    known, rest = parser.parse_known_args(argv)
    return rest if known.config is None else as_words(read_yaml(known.config)) + rest


def split_backend(words: Written) -> tuple[str, Written]:
    """The `--backend` of a command line, and all other words; an `InputError` if the backend is unknown."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--backend", default=BACKENDS[0])
    known, rest = parser.parse_known_args(words)
    if known.backend not in BACKENDS:
        raise InputError(f"--backend must be {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}, not {known.backend!r}.")
    return known.backend, rest


def add_first_flags(parser: argparse.ArgumentParser, backend: bool = False) -> None:
    """Give a parser the flags that were read before it, for its help."""
    if backend:
        text = "The library that loads and runs the model; auto: unsloth if it is installed and a GPU is there."
        parser.add_argument("--backend", choices=BACKENDS, default=BACKENDS[0], help=text)
    parser.add_argument("--config", metavar="FILE.yaml", help="A YAML file with any of these options; flags win.")


def parser_of(*kinds: Any, prog: str, description: str) -> TrlParser:
    """TRL's parser for these dataclasses, whose errors are `InputError`s."""
    from trl import TrlParser

    class Parser(TrlParser):
        def error(self, message: str) -> Any:
            raise InputError(f"{message}; see {prog} --help.")

    usage = f"{prog} [--flag value ...]"
    return Parser(kinds, prog=prog, usage=usage, description=description, allow_abbrev=False, formatter_class=Defaults)


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Help with the default of each flag that has one; that of a flag `--no_x` is said at `--x`."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        none = action.default in (None, []) or (action.nargs == 0 and action.default is False)
        return action.help if none else super()._get_help_string(action)


class _Plain(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise InputError(f"{message}; see {self.prog} --help.")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        try:
            known, rest = self.parse_known_args(args, namespace)
        except InputError:  # such as a required flag that is missing because it is mistyped
            flags = self._option_string_actions
            refuse_unknown(
                self, [word for word in args or () if is_flag(word) and word.partition("=")[0] not in flags]
            )
            raise
        refuse_unknown(self, rest)
        return known


def is_flag(word: str) -> bool:
    """Whether a word of a command line looks like a flag, not like a value or a negative number."""
    return re.match(r"--?[A-Za-z]\w*", word) is not None and " " not in word


def refuse_unknown(parser: argparse.ArgumentParser, words: Written) -> None:
    """Raise `InputError` for the words of a command line that its parser does not know, with the nearest flag."""
    if not words:
        return
    flag = next(filter(is_flag, words), None)
    if flag is None:
        raise InputError(f"{words[0]!r} belongs to no flag; see {parser.prog} --help.")
    flag = flag.partition("=")[0]
    near = get_close_matches(flag, parser._option_string_actions, 1)
    hint = f"; did you mean {near[0]}?" if near else f"; see {parser.prog} --help."
    raise InputError(f"unknown flag {flag}{hint}")


def plain_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """The parser of a command with few flags, whose errors are `InputError`s; its help has every default."""
    return _Plain(prog=prog, description=description, formatter_class=Defaults, allow_abbrev=False)


def read(parser: TrlParser, words: Written, **defaults: object) -> tuple[Any, ...]:
    """The dataclasses of a parser, and a namespace of its other flags if it has any.

    Raises:
        InputError: a flag is not known, or its value cannot be.
    """
    parser.set_defaults(**defaults)
    try:
        *found, rest = parser.parse_args_into_dataclasses(
            words, look_for_args_file=False, return_remaining_strings=True
        )
        refuse_unknown(parser, rest)
        return tuple(found)
    except InputError:
        raise
    except (ValueError, ImportError) as error:
        raise InputError(" ".join(str(error).split())) from None
