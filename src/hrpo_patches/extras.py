"""Asks for the packages that only some of the commands need."""

from __future__ import annotations

from importlib.util import find_spec

from hrpo_thinking.errors import InputError

EXTRAS = {
    "bm25s": "rag",
    "gguf": "quickstart",
    "gradio": "demo",
    "lm_eval": "lm-eval",
    "matplotlib": "quickstart",
    "reasoning_gym": "quickstart",
}


def require_package(package: str, what: str) -> None:
    """Raise an `InputError` that says what `what` needs installed, unless `package` can be imported.

    A package without an extra is installed by its own name.
    """
    if find_spec(package) is None:
        wanted = f"'hrpo_patches[{EXTRAS[package]}]'" if package in EXTRAS else package
        raise InputError(f"{what} needs {package}; run: pip install {wanted}")
