"""`hrpo push`: an adapter or a full model to the hub; says first which files, and at the end how to load them."""

from __future__ import annotations

import json
from pathlib import Path

from rich.table import Table

from hrpo_patches.commands.console import stdout_console
from hrpo_patches.commands.flags import Written, plain_parser
from hrpo_patches.models.hub import CONFIG
from hrpo_patches.models.push import Files, check_name, check_token, files_of, push
from hrpo_patches.models.record import THINKING_FILE


def main(argv: Written) -> None:
    """Push from a command line.

    Raises:
        InputError: before anything is pushed, if it cannot be.
        SaveError: the hub cannot be reached or refuses the push.
    """
    parser = plain_parser("hrpo push", "Push an adapter or a full model to the hub, with its card.")
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run, an adapter or a merged model")
    parser.add_argument("name", metavar="OWNER/NAME", help="the repository, which is created if need be")
    parser.add_argument("--private", action="store_true", help="create the repository private")
    parser.add_argument("--revision", help="the branch, which is created if need be; by default main")
    parser.add_argument("--base", metavar="OWNER/MODEL", help="the base model's hub id, if the adapter names a folder")
    text = "replace what the repository holds: other files are deleted there, in a new commit"
    parser.add_argument("--overwrite", action="store_true", help=text)
    given = parser.parse_args(argv)
    check_name(given.name)
    files = files_of(given.run, given.name, given.base)
    table = Table()
    table.add_column("file")
    table.add_column("size", justify="right")
    for name, content in files.items():
        table.add_row(name, size_of(content))
    print(f"{given.run} to {given.name}:")
    stdout_console().print(table)
    check_token()
    where = (given.name, given.private or None, given.revision)
    url = push(files, *where, others="delete" if given.overwrite else "refuse")
    print(f"pushed: {url}", "load it:", *how_to_load(files, given.name, given.revision), sep="\n  ")


def size_of(content: Path | bytes) -> str:
    """The size of a file, to be read."""
    return f"{(len(content) if isinstance(content, bytes) else content.stat().st_size) / 1e6:,.3f} MB"


def how_to_load(files: Files, name: str, revision: str | None) -> list[str]:
    """The lines by which what was pushed is loaded: a command, and Python."""
    place, first = f'"{name}"', f"hrpo think {name} --prompt 'What is 3 + 4?'"
    if revision is not None:
        folder = name.partition("/")[2]
        place, first = f'"{folder}"', f"hf download {name} --revision {revision} --local-dir {folder}"
    if CONFIG in files and THINKING_FILE in files:
        base = json.loads(bytes(files[CONFIG]))["base_model_name_or_path"]
        return [first, f'model = hrpo_patches.load_adapter("{base}", {place})']
    return [first, f"model = AutoModelForCausalLM.from_pretrained({place})"]
