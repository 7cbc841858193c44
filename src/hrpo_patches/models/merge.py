"""An adapter made into a full model, and an old adapter into one of ours."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from hrpo_patches.files import listed, whole_or_nothing
from hrpo_patches.models.adapter import config_of, load_adapter, weights_of
from hrpo_patches.models.base import base_of, check_without_base, read_config, tokenizer_of
from hrpo_patches.models.card import write_card
from hrpo_patches.models.checkpoint import mark
from hrpo_patches.models.hub import adapter_folder, find_adapter
from hrpo_patches.models.record import read_thinking, write_thinking
from hrpo_patches.models.smollm2 import cache_folder
from hrpo_thinking.config import ThinkingConfig, record_of
from hrpo_thinking.errors import require
from hrpo_thinking.families import check_vllm
from hrpo_thinking.modules import make_projection
from hrpo_thinking.parts import MODULES, PROJECTION, parts_of
from hrpo_thinking.request import check_residual

_PREFIX = "base_model.model.model."


def merge(adapter: str | Path, destination: Path, base: str | None = None) -> Path:
    """Write the full model that the adapter and its base make, in the base's dtype; thinking weights stay float32.

    Where hrpo_patches is imported, `AutoModelForCausalLM.from_pretrained(destination)` loads it, and it thinks by
    default; without, transformers refuses it with an error that names hrpo_patches.

    Args:
        adapter: a folder or a hub id that `load_adapter` takes.
        destination: must not exist; it appears when all of it is written.
        base: the base model, by default the one that the adapter names.

    Raises:
        InputError: the destination exists, the base is missing, or the adapter does not load.
    """
    adapter = adapter_folder(adapter)
    source = base_of(adapter, base)
    tokenizer = tokenizer_of(adapter, source)
    with whole_or_nothing(destination) as folder:
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
        loaded = load_adapter(model, adapter)
        for name, part in loaded.named_modules():
            biased = (
                isinstance(part, LoraLayer) and any(part.lora_bias.values()) and part.get_base_layer().bias is None
            )
            require(not biased, f"the adapter has a bias for {name}, which has none to merge it into (lora_bias).")
        merged: Any = loaded.merge_and_unload()
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        mark(folder)
        write_card(folder, str(source), None, ["hrpo"])
    return destination


def merged_for(name: str, base: str | None) -> str:
    """The folder, or the hub id, of a full model that thinks, for vLLM.

    An adapter is merged into a folder of the cache (`cache_folder`), where the next call finds it again, as long as
    no file of the adapter or of a base in a folder has changed.

    Args:
        name: a folder or hub id, of an adapter or of a model that was merged or trained whole.
        base: the adapter's base model, by default the one that it names.

    Raises:
        InputError: the model is missing, it does not think, or vLLM does not support its residual or its family.
    """
    adapter = find_adapter(name)
    if adapter is None:
        check_without_base(name, base)
        config = read_config(name)
        record = config.thinking if isinstance(config.thinking, dict) else {}
        require(
            record.get("in_checkpoint"),
            f"{name} was not trained to think: its config.json names no thinking weights. Give an adapter or a full "
            f"model that hrpo_patches trained, or serve this model by `vllm serve {name}`.",
        )
        check_residual(ThinkingConfig.from_dict(record).residual, "vLLM")
        check_vllm(config.model_type)
        return name
    record = read_thinking(adapter) or {}
    require(
        record, f"the adapter {name} does not say how it thinks; convert it by hrpo convert, or train it to think."
    )
    check_residual(record["residual"], "vLLM")
    source = str(base_of(adapter, base))
    check_vllm(read_config(source).model_type)
    known = [listed(adapter), source, listed(Path(source)) if Path(source).is_dir() else []]
    digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:12]
    folder = cache_folder() / "served" / f"{adapter.resolve().name}-{digest}"
    return str(folder if folder.is_dir() else merge(adapter, folder, source))


def convert(source: Path, destination: Path, residual: str, answer_start: str = "####", seed: int = 42) -> Path:
    """Write a published HRPO adapter (LoRA, gates, Λ) as one that says how it thinks.

    Args:
        source: the adapter; its weights must be safetensors.
        destination: must not exist.
        residual: "embedding", what it was trained with, or "projection", which starts a fresh projection for it.
        answer_start: the marker that it was trained with.
        seed: of a fresh projection.

    Raises:
        InputError: the destination exists, weights are missing or pickled, or the adapter already says how it thinks.
    """
    config = config_of(source)
    thinking = ThinkingConfig(residual, answer_start)
    text = f"{source} holds no adapter_model.safetensors; pickled weights are not read."
    require((source / "adapter_model.safetensors").is_file(), text)
    record = read_thinking(source) or {}
    text = f"{source} already says how it thinks ({record.get('residual')}); load it with hrpo_patches.load_adapter."
    require(not record, text)
    weights = weights_of(source)
    gate_name = f"{_PREFIX}thinking_residual_gate_r.weight"
    require(gate_name in weights, f"{source} holds no thinking gates, so it is not an HRPO adapter.")
    hidden_size = weights[gate_name].shape[0]
    modules = parts_of(residual)
    if PROJECTION in modules and f"{_PREFIX}{PROJECTION}.weight" not in weights:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            projection = make_projection(hidden_size, thinking)
        weights |= {f"{_PREFIX}{PROJECTION}.{n}": p.detach() for n, p in projection.named_parameters()}
    for name in modules:
        complete = any(key.startswith(f"{_PREFIX}{name}.") for key in weights)
        require(complete, f"{source} lacks {name}: it is damaged or was saved without its thinking weights.")
    thinking_keys = tuple(f"{_PREFIX}{name}." for name in MODULES)
    weights = {key: value.float() if key.startswith(thinking_keys) else value for key, value in weights.items()}
    config.modules_to_save = sorted(set(config.modules_to_save or []) | set(modules))
    with whole_or_nothing(destination) as folder:
        for file in source.iterdir():  # the tokenizer, the model card
            if file.is_file() and not file.name.startswith("adapter_"):
                shutil.copy(file, folder)
        config.save_pretrained(str(folder))
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        write_thinking(record_of(thinking), hidden_size, GenerationConfig(), folder)
    return destination
