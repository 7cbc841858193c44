"""`python -m hrpo_patches`: what is patched, what thinking costs, and the maintainer's two commands for the diffs."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hrpo_patches import export, overlay
from hrpo_patches.errors import InputError, PatchError

PROJECTION = ("projection_layers", "projection_hidden", "projection_norm")


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


def info(arguments: argparse.Namespace) -> int:
    """Print what thinking adds to a model."""
    from hrpo_patches.config import ThinkingConfig
    from hrpo_patches.info import costs, table_of

    options = {name: getattr(arguments, name) for name in PROJECTION}
    rows = costs(arguments.model, ThinkingConfig(**options))
    Console(width=None if sys.stdout.isatty() else 120).print(table_of(rows, arguments.model))
    return 0


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
    costs = commands.add_parser("info", help="show what thinking adds to a model: parameters, multiply-adds a token")
    costs.add_argument("model", help="hub id, folder, config.json, or smollm2-135m; no weights are loaded")
    costs.add_argument("--projection_layers", type=int, default=1, help="1, or 2 with SiLU between (default: 1)")
    costs.add_argument("--projection_hidden", type=int, default=None, help="width between two (default: hidden size)")
    costs.add_argument("--projection_norm", action="store_true", help="with a LayerNorm after the projection")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "info":
            return info(arguments)
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
