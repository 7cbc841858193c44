"""What a trainer checks of its model before the first step: each check is a sentence that says what to do."""

from __future__ import annotations

import logging
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from hrpo_patches.models.backends import NO_BPTT, backend_of
from hrpo_patches.thinking.adjoint import refuse_reentrant
from hrpo_patches.thinking.backbone import thinking_backbone
from hrpo_patches.thinking.decoding import changed_distribution
from hrpo_patches.thinking.mixin import ThinkingMixin
from hrpo_patches.thinking.sequential import refuse_dropout
from hrpo_patches.thinking.shards import partitioned
from hrpo_patches.training.config import ThinkingArguments
from hrpo_thinking.errors import InputError
from hrpo_thinking.marker import marker_table
from hrpo_thinking.parts import FALLBACK, RESIDUALS, ResidualKind, parts_of

logger = logging.getLogger(__name__)


def choose_bptt(base: PreTrainedModel, args: ThinkingArguments) -> None:
    """Set `args.bptt` to the default of the model's backend, unless the run sets it."""
    if args.bptt is not None:
        return
    default = backend_of(base).bptt
    args.bptt = default  # type: ignore[assignment]
    if not default:
        logger.warning(f"bptt is 0, the published gradient: {NO_BPTT}")


def check_model(
    model: nn.Module,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: ThinkingArguments,
    rollout: GenerationConfig | None,
) -> None:
    """Check that a model thinks, that its thinking weights are trained and saved, and that it can take the gradient.

    Args:
        model: the trainer's, unwrapped.
        base: the causal language model in it.
        tokenizer: must spell the marker.
        args: of the run; `bptt` is chosen.
        rollout: the trainer's generation config; None if nothing is sampled.

    Raises:
        InputError: the first check that fails.
    """
    check_readable(base)  # first: the others read weights
    backbone = thinking_backbone(base)
    residual = RESIDUALS[backbone.config.thinking["residual"]]
    check_marker(tokenizer, args.answer_start, backbone.config.vocab_size)
    check_trained(model, backbone, args.residual)
    check_states(model, base, residual)
    check_gradient(base, backbone, args)
    if rollout is not None and (args.depth or args.from_start) and not residual.needs_state:
        check_distribution(rollout)


def check_readable(base: nn.Module) -> None:
    """Refuse a model whose weights are in shards already: its parameters are empty."""
    if partitioned(base):
        raise InputError(
            "ZeRO-3 sharded this model when it was loaded, after the training arguments were made, and it cannot be "
            "looked at so; load it before them, or use FSDP2 or ZeRO-2, as hrpo train has to."
        )


def check_marker(tokenizer: PreTrainedTokenizerBase, marker: str, vocabulary: int) -> None:
    """Refuse a marker that the tokenizer cannot spell, or that a reward function would not see.

    TRL leaves special tokens out of completions.
    """
    marker_table(tokenizer, marker, vocabulary)  # raises where it cannot be spelled
    ids = tokenizer.encode(marker, add_special_tokens=False)
    if marker not in tokenizer.decode(ids, skip_special_tokens=True) and marker in tokenizer.decode(ids):
        raise InputError(
            f"the marker {marker!r} is a special token of this tokenizer, which no reward function sees; choose "
            f"another answer_start, or add it as a token that is not special."
        )


def check_trained(model: nn.Module, backbone: ThinkingMixin, residual: str | None) -> None:
    """Refuse a thinking module that is frozen, or that an adapter would not save."""
    for name in parts_of(residual):
        module = getattr(backbone, name)
        copied = isinstance(module, ModulesToSaveWrapper)
        # Without PEFT all weights are saved; with it, only the copies of `modules_to_save`.
        saved, trained = copied or not is_peft_model(model), module.modules_to_save if copied else module
        if not (saved and all(parameter.requires_grad for parameter in trained.parameters())):
            raise InputError(
                f"{name} is frozen, or would not be saved; pass peft_config to HRPOTrainer instead of a wrapped "
                f"model, or load the adapter with hrpo_patches.load_adapter(..., is_trainable=True)."
            )


def check_states(model: nn.Module, base: nn.Module, residual: ResidualKind) -> None:
    """Refuse a forward that does not return the last hidden state, if the residual is made from it."""
    # Two tokens are enough: whether the forward was replaced (by a kernel, a wrapper) does not depend on the text.
    with torch.no_grad():
        probe = torch.zeros(1, 2, dtype=torch.long, device=next(base.parameters()).device)
        outputs = model(input_ids=probe, output_last_hidden_state=True, use_cache=False)
    if residual.needs_state and getattr(outputs, "last_hidden_state", None) is None:
        raise InputError(
            f"the forward of {type(base).__name__} returns no last_hidden_state, so the {residual.name} would never "
            f"be used or trained; unwrap the model, or train with residual={FALLBACK!r}."
        )


def check_gradient(base: PreTrainedModel, backbone: ThinkingMixin, args: ThinkingArguments) -> None:
    """Refuse a gradient through thoughts that the backend, gradient checkpointing or dropout would make wrong."""
    backend = backend_of(base)
    if (args.depth or args.from_start) and not backend.bptt:
        raise InputError(NO_BPTT)
    if args.gradient_checkpointing and not backend.own_checkpointing:
        options: dict[str, Any] = args.gradient_checkpointing_kwargs or {"use_reentrant": False}  # type: ignore[assignment]
        refuse_reentrant(options, args.depth)
    if args.depth == "sequential":
        refuse_dropout(backbone, today=False)


def check_distribution(rollout: GenerationConfig) -> None:
    """Refuse a rollout whose distribution a live state cannot compute again: that takes the temperature alone."""
    changed = changed_distribution(rollout)
    if changed is not None:
        raise InputError(
            f"{changed[0]}={changed[1]!r} changes the distribution that the embedding residual is made from, and "
            f"bptt, or the reference 'start', makes it again from the temperature alone; remove it, or set bptt=0."
        )
