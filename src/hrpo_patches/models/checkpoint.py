"""Puts trained thinking weights into a full model's folder that was written without them.

Weights stay float32 whatever the rest is in, as everywhere: a 16-bit Λ would round a training run away.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hrpo_patches.files import replace
from hrpo_thinking.config import NEEDS_US
from hrpo_thinking.errors import require
from hrpo_thinking.parts import is_thinking_parameter

_INDEX = "model.safetensors.index.json"


def add_thinking(folder: Path, weights: dict[str, Tensor], thinking: dict[str, Any]) -> None:
    """Make the checkpoint in `folder` hold exactly these thinking weights, say so in its config, and think by default.

    Args:
        folder: holds config.json and safetensors, in one file or in shards with an index.
        weights: by the model's own names (`model.thinking_projection.weight`, ...).
        thinking: `config.thinking`.

    Raises:
        InputError: a full checkpoint in safetensors is missing.
    """
    shards = sorted(folder.glob("model*.safetensors"))
    complete = shards and (folder / "config.json").is_file()
    require(complete, f"{folder} holds no full model in safetensors, so it cannot be given thinking weights.")
    for shard in shards:
        _rewrite(shard, weights if shard == shards[-1] else {})
    if (folder / _INDEX).is_file():
        _update_index(folder, weights, shards[-1].name)
    _update_json(folder / "config.json", {"thinking": thinking | {"in_checkpoint": True}})
    mark(folder)


def mark(folder: Path) -> None:
    """Make the full model in `folder` think by default, and stock transformers refuse it instead of not thinking."""
    config = json.loads((folder / "config.json").read_text())
    kind, forced = config["model_type"], (config.get("thinking") or {}).get("thoughts")
    _update_json(folder / "config.json", {"model_type": kind.removesuffix(NEEDS_US) + NEEDS_US})
    _update_json(folder / "generation_config.json", {"thinking": True} | ({"thoughts": forced} if forced else {}))


def _rewrite(shard: Path, added: dict[str, Tensor]) -> None:
    """The file without the thinking weights that it has, and with `added`; left alone where that changes nothing."""
    with safe_open(shard, framework="pt") as file:
        stale = any(is_thinking_parameter(key) for key in file.keys())  # noqa: SIM118 - not a dict
        metadata = file.metadata()
    if not stale and not added:
        return
    others = {key: value for key, value in load_file(shard).items() if not is_thinking_parameter(key)}
    thinking = {key: value.detach().cpu().contiguous() for key, value in added.items()}
    replace(shard, lambda file: save_file(others | thinking, file, metadata=metadata or {"format": "pt"}))


def _update_index(folder: Path, weights: dict[str, Tensor], shard: str) -> None:
    files = json.loads((folder / _INDEX).read_text())["weight_map"]
    others = {key: file for key, file in files.items() if not is_thinking_parameter(key)}
    _update_json(folder / _INDEX, {"weight_map": others | dict.fromkeys(weights, shard)})


def _update_json(path: Path, changes: dict[str, Any]) -> None:
    content = (json.loads(path.read_text()) if path.is_file() else {}) | changes
    replace(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
