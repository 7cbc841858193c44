"""Loads a base model and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hrpo_patches.device import has_bf16, placed
from hrpo_patches.files import missing
from hrpo_patches.models.adapter import config_of, holds_thinking, load_adapter, load_plain_adapter
from hrpo_patches.models.backends import backend_named
from hrpo_patches.models.hub import find_adapter
from hrpo_patches.models.smollm2 import SMOLLM2, found
from hrpo_thinking.config import FORCED, ThinkingConfig, check_same_kind
from hrpo_thinking.errors import InputError, require
from hrpo_thinking.families import NAMES

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def _config(source: str | Path) -> Any:
    place = found(source)
    absent = missing(str(place), "model", (SMOLLM2,))
    require(not absent, f"the model {absent}")
    try:
        return AutoConfig.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise InputError(f"the model {str(source)!r} could not be loaded: {str(error).splitlines()[0]}") from None


def read_config(source: str | Path) -> Any:
    """The config of a model that can think; an `InputError` if it is missing, or its family has no patches."""
    config = _config(source)
    text = f"{str(source)!r} is a {config.model_type} model; hrpo_patches has patches for {NAMES} only."
    require(hasattr(config, "thinking"), text)
    return config


def thinking_options(source: str | Path, options: dict[str, Any]) -> dict[str, Any]:
    """What to pass as `thinking` to `from_pretrained(source)`: `options`, over what the checkpoint's config says.

    Raises:
        InputError: the model is missing, its family has no patches, or the checkpoint holds thinking weights of
            another residual or marker.
    """
    config = read_config(source)
    saved = config.thinking if ThinkingConfig.of(config) is not None and isinstance(config.thinking, dict) else {}
    check_same_kind(saved, options, repr(str(source)))
    if saved.get("in_checkpoint"):  # no weights depend on forced thoughts: they may be others
        return saved | {name: options[name] for name in FORCED if name in options}
    return saved | options


def load_model(
    name: str,
    thinking: ThinkingConfig | None,
    dtype: torch.dtype | None = None,
    backend: str = "transformers",
    max_seq_length: int = 2048,
    **init: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, which pads on the left.

    Args:
        name: a hub id, a folder, or "smollm2-135m".
        thinking: how the model thinks; None leaves the thinking modules out, and takes any family.
        dtype: of the base weights; by default bfloat16 on a GPU that has it, else float32.
        backend: "transformers", or "unsloth" where unsloth was imported first.
        max_seq_length: the longest prompt and completion, in tokens; unsloth's models are built for it.
        init: what else `from_pretrained` takes (`attn_implementation`).

    Raises:
        InputError: the model is missing, or it is to think and its family has no patches.
    """
    source = found(name)
    if thinking is not None:
        init["thinking"] = thinking_options(source, thinking.chosen())
    elif hasattr(_config(source), "thinking"):
        init["thinking"] = False
    if dtype is None:
        dtype = torch.bfloat16 if has_bf16() else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
        model = backend_named(backend).load(source, dtype, max_seq_length, **init)
    except InputError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"the model {name!r} could not be loaded: {str(error).splitlines()[0]}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def base_of(adapter: Path, base: str | None = None) -> str | Path:
    """Where to load an adapter's base model from: `base`, or else the one that the adapter names.

    Raises:
        InputError: no adapter there, it names no base, or the base cannot be loaded.
    """
    source: str = base or config_of(adapter).base_model_name_or_path
    require(source, f"{adapter} does not say which base model it belongs to; name it with --base.")
    thinking_options(source, {})  # raises where something is wrong with the base
    return found(source)


def check_without_base(name: str, base: str | None) -> None:
    """Raise `InputError` if a base is named for what is not an adapter."""
    require(base is None, f"{name} is not an adapter, so it has no base model; remove --base.")


def tokenizer_of(adapter: Path, base: str | Path) -> PreTrainedTokenizerBase:
    """The adapter's tokenizer, else the base's. For a folder without one, transformers may make an empty one up."""
    for place in (adapter, base):
        if not Path(place).is_dir() or any((Path(place) / name).is_file() for name in _VOCABULARIES):
            try:
                return AutoTokenizer.from_pretrained(place)
            except (OSError, ValueError):
                continue
    raise InputError(f"neither {adapter} nor {base} has a tokenizer, which knows what spells the marker.")


def open_model(name: str, base: str | None = None) -> tuple[Any, PreTrainedTokenizerBase]:
    """A model to look at or to evaluate, and its tokenizer: an adapter's folder or hub id, a merged model, or any
    base model. It is on this process's device (`run_device`).

    A plain adapter (`--residual none`) leaves the thinking weights fresh.

    Raises:
        InputError: as `load_model`, `load_adapter` and `base_of`.
    """
    adapter = find_adapter(name)
    if adapter is None:
        check_without_base(name, base)
        model, tokenizer = load_model(name, ThinkingConfig.of(read_config(name)) or ThinkingConfig())
        return placed(model.eval()), tokenizer
    source = base_of(adapter, base)
    model, _ = load_model(str(source), ThinkingConfig())
    tokenizer = tokenizer_of(adapter, source)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if not holds_thinking(adapter):
        return placed(load_plain_adapter(model, adapter)), tokenizer
    return placed(load_adapter(model, adapter)), tokenizer
