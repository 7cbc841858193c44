"""Reads a command's arguments from flags and a YAML file; knows TRL's parser, not what the arguments mean."""

from __future__ import annotations

from dataclasses import field
from typing import Any, Protocol, TypeVar

import yaml
from trl import TrlParser

from hrpo_thinking.errors import InputError


def option(default: Any, text: str) -> Any:
    """A dataclass field with its help text."""
    return field(default=default, metadata={"help": text})


class Arguments(Protocol):
    """A dataclass of arguments that can say what is wrong with them."""

    def check(self) -> None:
        """Raise an `InputError` for what cannot work."""


Kind = TypeVar("Kind", bound=Arguments)


def parsed(kind: type[Kind], argv: list[str] | None, prog: str | None = None, **defaults: object) -> Kind:
    """The arguments of a command line (by default this process's), checked; flags win over --config, over `defaults`.

    Raises:
        InputError: the config file is missing or has an unknown key, or an argument cannot work.
    """
    parser = TrlParser(kind, prog=prog, allow_abbrev=False)  # or --back would be read here and not by wanted_backend
    parser.set_defaults(**defaults)
    parser.add_argument("--config", metavar="FILE.yaml", help="A YAML file with any of these options; flags win.")
    try:
        (arguments,) = parser.parse_args_and_config(argv)[:1]
    except (ValueError, OSError, yaml.YAMLError) as error:
        raise InputError(" ".join(str(error).split())) from None
    arguments.check()
    return arguments
