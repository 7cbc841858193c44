"""Finds the folder of an adapter, here or on the hub; knows names and files, nothing of what is in them."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from hrpo_thinking.errors import InputError

CONFIG = "adapter_config.json"  # PEFT's, which an adapter has
_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # weights, configs and tokenizers; nothing pickled


def find_adapter(name: str | Path) -> Path | None:
    """The folder of the adapter of that name: a folder, or a hub id, which is fetched; None if it is no adapter."""
    folder = Path(name)
    if folder.exists():
        return folder if (folder / CONFIG).is_file() else None
    try:
        hf_hub_download(str(name), CONFIG)
        return Path(snapshot_download(str(name), allow_patterns=_FILES))
    except (EntryNotFoundError, LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError):
        return None


def adapter_folder(name: str | Path) -> Path:
    """As `find_adapter`; an `InputError` if there is none."""
    folder = find_adapter(name)
    if folder is None:
        raise InputError(f"{name} holds no adapter: {CONFIG} is missing, and it is no hub id that can be reached.")
    return folder
