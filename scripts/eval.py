"""Let a model answer the problems of a task, and grade them; see --help."""

from typing import Any

from hrpo_patches.commands.console import console


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """`hrpo_patches.commands.eval.main`, imported only now, so that errors of version are sentences."""
    from hrpo_patches.commands.eval import main as run

    return run(argv)


if __name__ == "__main__":
    console(main)
