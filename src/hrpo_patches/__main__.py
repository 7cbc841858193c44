"""`python -m hrpo_patches`: what is patched, and the maintainer's two commands for the diffs; knows no models."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hrpo_patches import export, overlay
from hrpo_patches.errors import InputError, PatchError


def state_of(patch: overlay.Patch) -> str:
    """One of: applied; not yet imported; refused, and why; not installed."""
    installed = overlay.installed_version(patch.package)
    site = overlay.site_of(patch.package)
    if installed is None or site is None:
        return "package not installed"
    if installed != patch.version:
        return f"refused: made for {patch.version}; run: pip install {patch.package}=={patch.version}"
    if patch in overlay.APPLIED:
        return "applied"
    try:
        overlay.patched_source(patch, (site / patch.target).read_text(encoding="utf-8"))
    except (PatchError, OSError) as error:
        return f"refused: {error}"
    return "not yet imported (fits)"


def status(load: bool) -> int:
    """Print a line for every target; with `load`, import the patched modules first. Returns 1 if any is refused."""
    if load:
        for patch in export.installed_patches():
            import_module(patch.module)
    table = Table(title="hrpo_patches")
    for column in ("package", "installed", "patch", "target", "state"):
        table.add_column(column, overflow="fold")
    states = [(patch, state_of(patch)) for patch in overlay.all_patches()]
    for patch, state in states:
        installed = overlay.installed_version(patch.package) or "-"
        name = f"{patch.file.parent.name}/{patch.file.name}"
        table.add_row(patch.package, installed, name, patch.target, state)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    return int(any(state.startswith("refused") for _, state in states))


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m hrpo_patches", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    shown = commands.add_parser("status", help="show every patch and whether it is applied, fits, or is refused")
    shown.add_argument("--load", action="store_true", help="import the patched modules first (takes seconds)")
    tree = commands.add_parser("checkout", help="write the patched upstream files into a folder, to be edited")
    tree.add_argument("folder", type=Path)
    again = commands.add_parser("refresh", help="regenerate the diffs from an edited folder")
    again.add_argument("folder", type=Path)
    again.add_argument("--into", type=Path, default=None, help="where the diffs go (default: the project's patches/)")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "status":
            return status(arguments.load)
        if arguments.command == "checkout":
            written = export.checkout(arguments.folder)
        else:
            written = export.refresh(arguments.folder, arguments.into)
    except (InputError, PatchError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(str(path) for path in written))
    return 0


if __name__ == "__main__":
    sys.exit(main())
