"""`hrpo status`, `checkout`, `refresh`: what of upstream is patched."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from rich.table import Table

from hrpo_patches.commands.console import stdout_console
from hrpo_patches.commands.flags import Written, plain_parser
from hrpo_patches.patching import export, overlay


def load_patched() -> dict[str, str]:
    """Import the patched modules, unsloth's first as it wants; by module, why one could not be imported."""
    failed = {}
    for patch in sorted(export.installed_patches(), key=lambda patch: patch.package, reverse=True):
        try:
            import_module(patch.module)
        except Exception as error:  # unsloth raises all kinds without a GPU
            failed[patch.module] = f"could not be imported: {str(error).splitlines()[0]}"
    return failed


def status(argv: Written) -> int:
    """Print a line for every target; returns 1 if any is refused."""
    parser = plain_parser("hrpo status", "Show every patch and whether it is applied, fits, or is refused and why.")
    parser.add_argument("--load", action="store_true", help="import the patched modules first (takes seconds)")
    failed = load_patched() if parser.parse_args(argv).load else {}
    table = Table(title="hrpo_patches")
    for column in ("package", "installed", "patch", "target", "state"):
        table.add_column(column, overflow="fold")
    states = [(patch, failed.get(patch.module) or overlay.state_of(patch)) for patch in overlay.all_patches()]
    for patch, state in states:
        installed = overlay.installed_version(patch.package) or "-"
        table.add_row(patch.package, installed, patch.name, patch.target, state)
    stdout_console().print(table)
    return int(any(state.startswith("refused") for _, state in states))


def checkout(argv: Written) -> None:
    """Write the patched upstream files out."""
    parser = plain_parser("hrpo checkout", "Write the patched upstream files into a folder, to be read.")
    parser.add_argument("folder", type=Path, help="where they go; no file is overwritten")
    print(*export.checkout(parser.parse_args(argv).folder), sep="\n")


def refresh(argv: Written) -> None:
    """Write what is generated: the families' diffs and the table of options."""
    text = "Write the diffs of the model families from their templates, and docs/options.md from the options."
    parser = plain_parser("hrpo refresh", text)
    parser.add_argument("--into", type=Path, help="where they go, if not into the checkout")
    into = parser.parse_args(argv).into
    table = (into or export.patches_root().parent / "docs") / "options.md"
    written = export.refresh(into)
    table.write_text(option_table(), encoding="utf-8")
    print(*written, table, sep="\n")


OF_THE_MACHINE = {"bf16", "gradient_checkpointing", "dataloader_pin_memory"}  # whose defaults are what the GPU can do


def option_table() -> str:
    """docs/options.md: the flags of `hrpo train` that have something of ours, made from what the parser knows."""
    from hrpo_patches.commands.train_flags import OF_TRL, make_parser, own_flags

    own, text = set(own_flags()), OPTIONS_INTRODUCTION
    for group in make_parser("hrpo train")._action_groups:
        actions = [one for one in group._group_actions if one.dest in own and one.const is not False and one.help]
        if not actions:
            continue
        title = str(group.title)
        text += f"\n## {title[0].upper()}{title[1:]}\n\n| flag | default | what |\n| --- | --- | --- |\n"
        for action in actions:
            names = [f"`{name}`" for name in action.option_strings if "-" not in name[2:]]
            default = "as the GPU can" if action.dest in OF_THE_MACHINE else action.default
            shown = "" if default in (None, []) else f"`{default}`"
            what = "as in TRL" if action.dest in OF_TRL else str(action.help)
            text += f"| {', '.join(names)} | {shown} | {what} |\n"
    return text


OPTIONS_INTRODUCTION = """# Options of a training run

Made by `hrpo refresh` from the options themselves. Beside these, every option of TRL's `GRPOConfig` is a flag
(`hrpo train --help_all`). A second name is that of the published HRPO scripts. Any of them can stand in the YAML file
of `--config`, by either name; flags win over it.
"""
