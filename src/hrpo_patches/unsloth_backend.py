"""Models and adapters through unsloth's FastLanguageModel; knows unsloth's names, nothing of training.

Only `is_unsloth` may be called where unsloth is not installed.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hrpo_patches.thinking import is_thinking_parameter


def is_unsloth(model: nn.Module) -> bool:
    """Whether `model` (a causal language model, or PEFT around one) runs unsloth's forward."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "unsloth" in sys.modules and type(base).forward.__module__.startswith("unsloth.")


def load_base(source: Any, thinking: dict[str, Any] | bool, dtype: torch.dtype, max_seq_length: int) -> Any:
    """The base model, with thinking modules unless `thinking` is False; `max_seq_length` is prompt and completion."""
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        str(source), max_seq_length=max_seq_length, dtype=dtype, load_in_4bit=False, thinking=thinking
    )
    return model


def add_adapter(model: Any, options: dict[str, Any], modules_to_save: list[str], seed: int) -> Any:
    """`model` with a fresh LoRA adapter (`options` as peft.LoraConfig's) and trainable copies of the modules."""
    from unsloth import FastLanguageModel

    return FastLanguageModel.get_peft_model(
        model,
        **options,
        modules_to_save=modules_to_save or None,
        use_gradient_checkpointing="unsloth",
        random_state=seed,
    )


def finish_adapter(model: PreTrainedModel, is_trainable: bool) -> Any:
    """Give a PEFT model that PEFT itself built what unsloth gives to its own: fused LoRA kernels and their modes."""
    from unsloth import FastLanguageModel

    model = FastLanguageModel.patch_peft_model(model, use_gradient_checkpointing="unsloth")
    for name, parameter in model.named_parameters():
        if "lora_" in name or (is_thinking_parameter(name) and ".modules_to_save." in name):
            parameter.requires_grad_(is_trainable)
    return FastLanguageModel.for_training(model) if is_trainable else FastLanguageModel.for_inference(model)
