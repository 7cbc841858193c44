"""Finds the files of an adapter, in a folder or on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from hrpo_patches.files import missing
from hrpo_thinking.errors import InputError

CONFIG = "adapter_config.json"  # PEFT's, which an adapter has
_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # weights, configs and tokenizers; nothing pickled


def find_file(name: str | Path, file: str, **hub: Any) -> Path | None:
    """A file in a folder, or of the hub id `owner/repository`; None if it is not there, or the hub cannot be asked.

    `hub` are options of `hf_hub_download`, such as token, revision and cache_dir.
    """
    folder = Path(name)
    if folder.exists() or str(name).count("/") != 1:
        return folder / file if (folder / file).is_file() else None
    try:
        return Path(hf_hub_download(str(name), file, **hub))
    except (HfHubHTTPError, HFValidationError, OSError):
        return None


def run_folder(name: str) -> str:
    """The folder of a run, where its `report.json` is, also of one on the hub; `name` itself where it has none."""
    report = find_file(name, "report.json")
    return str(report.parent) if report is not None else name


def find_adapter(name: str | Path) -> Path | None:
    """The folder of the adapter `name`, a folder or a hub id, which is fetched; None if it is not an adapter."""
    config = None if missing(str(name), "model") else find_file(name, CONFIG)
    if config is None or Path(name).exists():
        return config and config.parent
    return Path(snapshot_download(str(name), allow_patterns=_FILES))


def adapter_folder(name: str | Path) -> Path:
    """As `find_adapter`; an `InputError` if it is missing."""
    absent, folder = missing(str(name), "model"), None
    if absent is not None:
        problem = f"the adapter {absent}"  # with the nearest name that exists
    elif (folder := find_adapter(name)) is None and Path(name).exists():
        problem = (
            f"{name} holds no adapter: {CONFIG} is missing. Give the folder that a run saved its adapter to, or one "
            f"of its checkpoints."
        )
    else:
        problem = (
            f"{name} holds no adapter: it is not a folder here, and {CONFIG} could not be downloaded from a "
            f"repository of this name. Check the name and the connection; a private repository requires a token "
            f"(HF_TOKEN)."
        )
    if folder is None:
        raise InputError(problem)
    return folder
