"""Where commands print their tables."""

from __future__ import annotations

import sys

from rich.console import Console

UNLIMITED = 10_000  # columns


def stdout_console() -> Console:
    """A console as wide as the terminal; in a file or a pipe, with plain text in lines as long as need be."""
    return Console(width=None if sys.stdout.isatty() else UNLIMITED)
