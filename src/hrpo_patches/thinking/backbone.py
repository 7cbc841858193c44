"""Finds the part of a model that thinks, whatever wraps it, and sets attributes temporarily."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from hrpo_thinking.config import ThinkingConfig
from hrpo_thinking.errors import InputError
from hrpo_thinking.families import NAMES, check_unsloth
from hrpo_thinking.modules import ThinkingModule
from hrpo_thinking.parts import parts_of

if TYPE_CHECKING:  # transformers is importing this module
    from peft import PeftModel
    from transformers import PreTrainedModel

    from hrpo_patches.thinking.mixin import ThinkingMixin

    Model = PreTrainedModel | PeftModel  # a causal language model, with or without an adapter


@contextmanager
def temporarily(thing: object, **attributes: object) -> Iterator[None]:
    """Within, `thing` has these attributes; afterwards, those that it had before."""
    before = {name: getattr(thing, name) for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(thing, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(thing, name, value)


def causal_lm(model: nn.Module) -> Any:
    """The causal language model inside of what PEFT or a data parallel wrapper put around it."""
    inner: Any = model
    # DDP and others have their model in `module`; PEFT's, which has both, knows its base.
    while hasattr(inner, "module") and not hasattr(inner, "get_input_embeddings"):
        inner = inner.module
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def runs_unsloth(kind: type) -> bool:
    """Whether unsloth has put its forward into this class of causal language models."""
    return kind.forward.__module__.startswith("unsloth.")  # type: ignore[attr-defined]


def patched_backbone(model: nn.Module) -> ThinkingMixin:
    """The part of `model` that holds the thinking modules, or could.

    Raises:
        InputError: its family has no patches, or none for unsloth, whose forward the model runs.
    """
    base = causal_lm(model)
    backbone = getattr(base, "base_model", base)
    if not hasattr(backbone, "blend_thinking"):
        raise InputError(f"{type(base).__name__} cannot think: hrpo_patches has patches for {NAMES} only.")
    if runs_unsloth(type(base)):
        check_unsloth(base.config.model_type)
    return backbone


def hands_over_states(model: nn.Module) -> bool:
    """Whether the forward of a causal language model takes `output_last_hidden_state`."""
    return "output_last_hidden_state" in signature(type(model).forward).parameters


def thinking_backbone(model: nn.Module) -> ThinkingMixin:
    """The part of `model` that holds the thinking modules.

    Raises:
        InputError: its family has no patches, or it was built without thinking.
    """
    backbone = patched_backbone(model)
    if ThinkingConfig.of(backbone.config) is None:
        raise InputError(
            f"this {type(causal_lm(model)).__name__} is a plain one, without thinking modules; load it with "
            f"thinking={{}} to add them, or generate without thinking=True."
        )
    return backbone


def is_untrained(model: nn.Module) -> bool:
    """Whether thinking weights that the model uses are missing, or were never trained or loaded."""
    if (thinking := ThinkingConfig.of(causal_lm(model).config)) is None:
        return True
    used = parts_of(thinking.residual)  # a projection that is not used may stay as it was drawn
    named = [(name.split("."), module) for name, module in model.named_modules() if isinstance(module, ThinkingModule)]
    parts = [module for name, module in named if set(name) & set(used) and "original_module" not in name]
    return any(part.is_fresh() for part in parts)


@torch.no_grad()
def ratio_of(backbone: ThinkingMixin, tokens: list[int], mask: Tensor) -> Tensor:
    """The mean share (C,) of the embedding in each token's input, float32: 1 where it does not think."""
    table: Any = backbone.get_input_embeddings().weight
    ratio = backbone.thinking_decay(embedding(torch.tensor(tokens, device=table.device), table)).mean(-1).float()
    return torch.where(mask.to(ratio.device), ratio, 1.0)
