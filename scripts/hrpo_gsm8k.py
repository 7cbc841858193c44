"""Train a Qwen2 or Llama model on GSM8K, or data of its shape, with hybrid latent reasoning; see --help."""

from typing import Any

from hrpo_patches.commands.console import console, train


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train from a command line, by default this process's; returns what `report.json` holds."""
    return train(argv, task="gsm8k")


if __name__ == "__main__":
    console(main)
