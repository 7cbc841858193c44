"""Train a Qwen2 or Llama model on GSM8K, or data of its shape, with hybrid latent reasoning; see --help."""

from typing import Any

from hrpo_patches.console import console


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """`hrpo_patches.run.main`, imported only now: after unsloth, and so that errors of version are sentences."""
    from hrpo_patches.backend import start_backend, wanted_backend

    start_backend(wanted_backend(argv))
    from hrpo_patches.run import main as run

    return run(argv)


if __name__ == "__main__":
    console(main)
