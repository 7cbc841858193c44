"""What thinking adds to a model, in parameters and multiply-adds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM

from hrpo_patches.models.base import read_config
from hrpo_thinking.config import ThinkingConfig, about_parts, check_same_kind, record_of
from hrpo_thinking.parts import MODULES, is_thinking_parameter


@dataclass
class Cost:
    """One row: how many parameters it has, and how many multiply-adds it costs for every token."""

    name: str
    parameters: int
    multiply_adds: int


def _cost(name: str, module: nn.Module) -> Cost:
    """Each weight matrix of a linear layer is one multiply-add an entry; vectors are not counted."""
    linear = sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))
    return Cost(name, sum(parameter.numel() for parameter in module.parameters()), linear)


def config_that_thinks(source: str, thinking: ThinkingConfig) -> Any:
    """A model's config, with these options of thinking, or the ones that it was merged with.

    Args:
        source: a hub id, a folder, a `config.json`, or "smollm2-135m".
        thinking: what is taken where the model does not think by itself.

    Raises:
        InputError: the model is missing, its family has no patches, or it thinks in another way.
    """
    folder = str(Path(source).parent) if Path(source).name == "config.json" else source
    config = read_config(folder)
    saved = config.thinking if isinstance(config.thinking, dict) else {}
    if saved.get("in_checkpoint") and thinking == ThinkingConfig():  # a merged model has a projection of its own kind
        thinking = ThinkingConfig.from_dict(saved)
    check_same_kind(saved, {name: getattr(thinking, name) for name in about_parts()}, repr(source))
    config.thinking = record_of(thinking)
    return config


def costs(source: str, thinking: ThinkingConfig) -> list[Cost]:
    """The base model, each thinking module, and the embedding residual that the projection stands in for.

    Args:
        source: a hub id, a folder, a `config.json`, or "smollm2-135m"; only the config is read.
        thinking: the options of the projection.

    Raises:
        InputError: the model is missing, or its family has no patches.
    """
    config = config_that_thinks(source, thinking)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters = sum(p.numel() for name, p in model.named_parameters() if not is_thinking_parameter(name))
    backbone = model.get_decoder()
    added = [_cost(name, getattr(backbone, name)) for name in MODULES]
    linear = _cost("", model).multiply_adds - sum(row.multiply_adds for row in added)
    size = config.vocab_size * config.hidden_size
    return [Cost("base model", parameters, linear), *added, Cost("embedding residual", 0, size)]


def table_of(rows: list[Cost], title: str) -> Table:
    """The costs as a table, with the shares of the base model and the sums for either residual."""
    base, projection, *shared, embedding = rows
    alternatives = {"all, projection": [projection, *shared], "all, embedding residual": [embedding, *shared]}
    sums = [
        Cost(name, sum(row.parameters for row in used), sum(row.multiply_adds for row in used))
        for name, used in alternatives.items()
    ]
    times = embedding.multiply_adds / projection.multiply_adds
    table = Table(
        title=title,
        caption=f"The embedding residual costs {times:.1f} times the projection. Multiply-adds are those of weight "
        f"matrices; the attention over the context comes on top.",
    )
    table.add_column("", no_wrap=True)
    for column in ("parameters", "of base", "multiply-adds a token", "of base"):
        table.add_column(column, justify="right")
    for row in [*rows, *sums]:
        shares = row.parameters / base.parameters, row.multiply_adds / base.multiply_adds
        cells = f"{row.parameters:,}", f"{shares[0]:.3%}", f"{row.multiply_adds:,}", f"{shares[1]:.3%}"
        table.add_row(row.name, *cells, end_section=row in (base, embedding))
    return table
