"""`python -m hrpo_patches`: the commands; knows their flags, and leaves the work to others."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten

from rich.console import Console
from rich.table import Table

from hrpo_patches.patching import export, overlay
from hrpo_thinking.errors import InputError, PatchError
from hrpo_thinking.parts import RESIDUALS

PROJECTION = ("projection_layers", "projection_hidden", "projection_norm")


def state_of(patch: overlay.Patch) -> str:
    """One of: applied; not yet imported; refused, and why; not installed."""
    installed = overlay.installed_version(patch.package)
    site = overlay.site_of(patch.package)
    if installed is None or site is None:
        return "package not installed"
    if patch in overlay.APPLIED:
        return "applied"
    try:
        overlay.patched_source(patch, (site / patch.target).read_text(encoding="utf-8"))
    except (PatchError, OSError) as error:
        return f"refused: {error}"
    return "not yet imported (fits)"


def load_patched() -> dict[str, str]:
    """Import the patched modules, unsloth's first as it wants; by module, why one could not be imported."""
    failed = {}
    for patch in sorted(export.installed_patches(), key=lambda patch: patch.package, reverse=True):
        try:
            import_module(patch.module)
        except Exception as error:  # unsloth raises all kinds where there is no GPU
            failed[patch.module] = f"could not be imported: {str(error).splitlines()[0]}"
    return failed


def status(load: bool) -> int:
    """Print a line for every target; with `load`, import the patched modules first. Returns 1 if any is refused."""
    failed = load_patched() if load else {}
    table = Table(title="hrpo_patches")
    for column in ("package", "installed", "patch", "target", "state"):
        table.add_column(column, overflow="fold")
    states = [(patch, failed.get(patch.module) or state_of(patch)) for patch in overlay.all_patches()]
    for patch, state in states:
        installed = overlay.installed_version(patch.package) or "-"
        table.add_row(patch.package, installed, patch.name, patch.target, state)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    return int(any(state.startswith("refused") for _, state in states))


def info(arguments: argparse.Namespace) -> int:
    """Print what thinking adds to a model."""
    from hrpo_patches.models.cost import costs, table_of
    from hrpo_thinking.config import ThinkingConfig

    options = {name: getattr(arguments, name) for name in PROJECTION}
    rows = costs(arguments.model, ThinkingConfig(**options))
    Console(width=None if sys.stdout.isatty() else 120).print(table_of(rows, arguments.model))
    return 0


def written(paths: list[Path]) -> int:
    """Print what a command wrote."""
    for path in paths:
        print(path)
    return 0


def merge(arguments: argparse.Namespace) -> int:
    """Make a full model of an adapter."""
    from hrpo_patches.models.merge import merge as run

    return written([run(arguments.adapter, arguments.destination, arguments.base)])


def convert(arguments: argparse.Namespace) -> int:
    """Make a published HRPO adapter one of ours."""
    from hrpo_patches.models.merge import convert as run

    return written([run(arguments.source, arguments.destination, arguments.residual, arguments.answer_start)])


def report(arguments: argparse.Namespace) -> int:
    """Draw runs side by side."""
    from hrpo_patches.monitor.report import read_runs, table, write_report

    paths = write_report(arguments.runs, arguments.out)
    print(table(read_runs(arguments.runs)))
    return written(paths)


def think(arguments: argparse.Namespace) -> int:
    """Show one completion, token by token."""
    from hrpo_patches.evaluation import think as inside
    from hrpo_patches.models.base import open_model
    from hrpo_patches.thinking.backbone import is_untrained

    if arguments.png is not None:
        inside.check_png(arguments.png)
    console = Console(width=None if sys.stdout.isatty() else 120)
    with console.status("loading"):
        model, tokenizer = open_model(arguments.model, arguments.base)
    chat = tokenizer.chat_template is not None and not arguments.plain
    prompt = [{"role": "user", "content": arguments.prompt}] if chat else arguments.prompt
    with console.status("thinking"):
        numbers = (arguments.max_new_tokens, arguments.temperature, arguments.top, arguments.seed)
        thoughts = inside.think(model, tokenizer, prompt, *numbers)
    title = shorten(f"{arguments.model}: {arguments.prompt}", 100, placeholder=" …")
    console.print(inside.table_of(thoughts, title))
    if is_untrained(model):
        console.print("The thinking weights are fresh, not trained: the residuals mean nothing yet.")
    return written([inside.draw(thoughts, title, arguments.png)] if arguments.png is not None else [])


def evaluate(argv: list[str]) -> int:
    """Evaluate a model on a task."""
    from hrpo_patches.commands.eval import main as run

    run(argv)
    return 0


def lm_eval(argv: list[str]) -> int:
    """Run lm-evaluation-harness with `hrpo` among its models."""
    if find_spec("lm_eval") is None:
        raise InputError("lm_eval needs lm-evaluation-harness; run: pip install 'hrpo_patches[lm-eval]'")
    from hrpo_patches.evaluation.harness import main as run

    return run(argv)


PASSED_ON: dict[str, Callable[[list[str]], int]] = {"eval": evaluate, "lm_eval": lm_eval}  # with flags of their own


def parser() -> argparse.ArgumentParser:
    """The commands, each with the function that does it."""
    top = argparse.ArgumentParser(prog="python -m hrpo_patches", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)

    def command(name: str, text: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, description=text)
        one.set_defaults(run=run)
        return one

    one = command(
        "status", "show every patch and whether it is applied, fits, or is refused", lambda a: status(a.load)
    )
    one.add_argument("--load", action="store_true", help="import the patched modules first (takes seconds)")
    one = command("info", "show what thinking adds to a model: parameters, multiply-adds a token", info)
    one.add_argument("model", help="hub id, folder, config.json, or smollm2-135m; no weights are loaded")
    one.add_argument("--projection_layers", type=int, default=1, help="1, or 2 with SiLU between (default: 1)")
    one.add_argument("--projection_hidden", type=int, default=None, help="width between two (default: hidden size)")
    one.add_argument("--projection_norm", action="store_true", help="with a LayerNorm after the projection")
    one = command("merge", "make a full model, which thinks by default, of an adapter and its base", merge)
    one.add_argument("adapter", type=Path, help="the folder of a trained adapter")
    one.add_argument("destination", type=Path, help="the full model's folder; must not exist")
    one.add_argument("--base", default=None, help="the base model (default: the one that the adapter names)")
    one = command("convert", "make a published HRPO adapter (LoRA, gates, Lambda) say how it thinks", convert)
    one.add_argument("source", type=Path, help="the folder of the published adapter")
    one.add_argument("destination", type=Path, help="the new adapter's folder; must not exist")
    text = "embedding: what it was trained with; projection: with a fresh projection, to be trained further"
    one.add_argument("--residual", choices=tuple(RESIDUALS), required=True, help=text)
    one.add_argument("--answer_start", default="####", help="the marker that it was trained with (default: ####)")
    one = command("report", "draw training runs side by side into a PNG, and put them into a Markdown table", report)
    one.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN_DIR", help="the --output_dir of a run, also unfinished"
    )
    text = "where they go, without the ending; must not exist (default: report, for report.png and report.md)"
    one.add_argument("--out", type=Path, default=Path("report"), help=text)
    one = command("think", "show one completion: each token's a, its residual's nearest words, the entropy", think)
    one.add_argument("model", help="an adapter's folder, a merged model, a hub id, or smollm2-135m")
    one.add_argument("--prompt", required=True, help="the question")
    one.add_argument("--plain", action="store_true", help="as it is, without the tokenizer's chat template")
    one.add_argument("--max_new_tokens", type=int, default=64, help="where the completion is cut (default: 64)")
    one.add_argument("--temperature", type=float, default=0.0, help="of the sampling (default: 0, greedy)")
    one.add_argument("--seed", type=int, default=42, help="of the sampling (default: 42)")
    one.add_argument("--top", type=int, default=3, help="words for each residual (default: 3)")
    one.add_argument("--base", default=None, help="the base model (default: the one that the adapter names)")
    one.add_argument("--png", type=Path, default=None, help="draw it into this file, too; must not exist")
    text = "let a model answer a task's problems, and grade them (flags: eval --help)"
    commands.add_parser("eval", help=text, add_help=False)
    text = "lm-evaluation-harness, with the model `hrpo`, which thinks (flags: lm_eval --help)"
    commands.add_parser("lm_eval", help=text, add_help=False)
    text = "for maintainers: write the patched upstream files into a folder, to be read"
    command("checkout", text, lambda a: written(export.checkout(a.folder))).add_argument("folder", type=Path)
    text = "for maintainers: write the diffs of the model families from their templates"
    one = command("refresh", text, lambda a: written(export.refresh(a.into)))
    one.add_argument("--into", type=Path, default=None, help="where they go (default: the project's patches/)")
    return top


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv and argv[0] in PASSED_ON:
            return PASSED_ON[argv[0]](argv[1:])
        arguments = parser().parse_args(argv)
        return int(arguments.run(arguments))
    except (InputError, PatchError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
