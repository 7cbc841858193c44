"""Decides which library loads and runs the model, before either is imported; knows nothing of models.

unsloth has to be imported before transformers, so a script asks here first, with nothing but its command line.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

from hrpo_patches.overlay import check, installed_version
from hrpo_thinking.errors import InputError, PatchError

BACKENDS = ("auto", "transformers", "unsloth")


def wanted_backend(argv: list[str] | None) -> str:
    """The `--backend` of a command line (by default this process's) or of its `--config`; else "auto"."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--backend")
    parser.add_argument("--config", type=Path)
    known, _ = parser.parse_known_args(argv)
    if known.backend is None and known.config is not None and known.config.is_file():
        import yaml

        try:
            options = yaml.safe_load(known.config.read_text())
        except yaml.YAMLError:
            options = None  # the command line's own parser says what is wrong with the file
        known.backend = options.get("backend") if isinstance(options, dict) else None
    return known.backend or "auto"


def choose_backend(wanted: str) -> tuple[str, str]:
    """("transformers" or "unsloth", why). Imports torch to ask for a GPU, and nothing else.

    Raises:
        InputError: there is no such backend, or unsloth was asked for and cannot be used.
        PatchError: unsloth was asked for and there are no patches for the installed version.
    """
    if wanted not in BACKENDS:
        raise InputError(f"--backend has to be auto, transformers or unsloth, not {wanted!r}.")
    if wanted == "transformers":
        return "transformers", "asked for"
    obstacle = _obstacle(refuse=wanted == "unsloth")
    if obstacle is None:
        return "unsloth", "asked for" if wanted == "unsloth" else "it is installed and a GPU is there"
    if wanted == "unsloth":
        raise InputError(f"--backend unsloth cannot be used: {obstacle}.")
    return "transformers", obstacle


def _obstacle(refuse: bool) -> str | None:
    """Why unsloth cannot be used here, or None; with `refuse`, a version without patches raises its own error."""
    if "unsloth" in sys.modules:
        return None
    if installed_version("unsloth") is None:
        return "unsloth is not installed (pip install 'hrpo_patches[unsloth]')"
    try:
        check("unsloth")
    except PatchError as error:
        if refuse:
            raise
        return str(error)
    import torch

    if not torch.cuda.is_available():
        return "no GPU is there"
    if "transformers" in sys.modules:
        return "transformers was imported first; import unsloth, or call start_backend, before it"
    return None


def start_backend(wanted: str) -> str:
    """Import unsloth if it is to be used, and say in one line what was chosen and why; returns the backend.

    Raises:
        InputError, PatchError: as `choose_backend`.
    """
    backend, why = choose_backend(wanted)
    if backend == "unsloth":
        import_module("unsloth")
    if not _said:
        name = f"{backend} {installed_version(backend)}"
        print(f"backend: {name} ({why})")
        _said.append(name)
    return backend


_said: list[str] = []
