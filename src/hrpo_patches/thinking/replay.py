"""A rollout's thinking, and how it is replayed; knows models and tensors, nothing of trainers or text.

The rollout keeps the states, not the residuals: the replay makes the residuals anew with today's weights, which
is what carries the gradient to the projection. The states themselves are constants, in the first pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from hrpo_patches.thinking.backbone import causal_lm, thinking_backbone
from hrpo_patches.thinking.passes import Head, Passes, check_passes, live_states
from hrpo_patches.thinking.shards import head_of, weight_of
from hrpo_thinking.errors import InputError
from hrpo_thinking.parts import RESIDUALS, ResidualKind


@dataclass
class Rollout:
    """What a rollout's completions thought.

    Attributes:
        states: (B, C, d), the state that produced each completion token (or the finished residual).
        mask: (B, C) bool, which completion tokens think.
        residual: what the states are.
    """

    states: Tensor
    mask: Tensor
    residual: str

    def aligned(self, width: int) -> Rollout:
        """The same for completions that were cut or right-padded to `width` tokens."""
        extra = width - self.mask.shape[1]  # negative cuts
        return Rollout(pad(self.states, (0, 0, 0, extra)), pad(self.mask, (0, extra)), self.residual)

    def model_inputs(self, rows: slice = slice(None)) -> dict[str, Any]:
        """Keyword arguments for a forward over `rows` of (prompt + completion), aligned with its last C positions."""
        return {
            "thinking_states": self.states[rows].detach(),
            "thinking_mask": self.mask[rows],
            "thinking_residual": self.residual,
        }


class DistributionHead:
    """Makes what a residual keeps of last hidden states, with the gradient through the distribution.

    Args:
        model: the causal language model.
        kind: the residual.
        temperature: of the rollout; its distribution is taken over the whole vocabulary.
    """

    def __init__(self, model: Any, kind: ResidualKind, temperature: float = 1.0) -> None:
        self.kind = kind
        self.head, self.temperature = head_of(model), temperature
        self.table = model.get_input_embeddings()
        self.vocabulary = model.config.vocab_size

    def __call__(self, states: Tensor) -> Tensor:
        logits = self.head(states)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature
        return self.kind.observe(states, logits, weight_of(self.table))


def distribution_head(model: Any, residual: str, temperature: float) -> Head | None:
    """What makes residuals of live states, where the state alone does not do."""
    kind = RESIDUALS[residual]
    return None if kind.needs_state else DistributionHead(model, kind, temperature)


def passes_inputs(model: Any, passes: Passes, residual: str, temperature: float = 1.0) -> dict[str, Any]:
    """Keyword arguments for a forward of `model` in so many passes; none for one.

    Raises:
        InputError: `passes` is neither a whole number from 1 nor "all".
    """
    check_passes(passes)
    if passes == 1:
        return {}
    return {"thinking_passes": passes, "thinking_head": distribution_head(model, residual, temperature)}


def replay_forward(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    thinking_states: Tensor | None = None,
    thinking_mask: Tensor,
    passes: Passes = 1,
    temperature: float = 1.0,
    **kwargs: Any,
) -> Any:
    """A forward over prompts and completions whose thinking positions are replayed in so many passes.

    With one pass this is `model(...)`: the residuals come from the stored states, which are constants. Each later pass
    makes them from the live states of the one before, so that a gradient also reaches what was written into a thought,
    k - 1 thoughts back. "all" thinks the masked positions anew, one by one, and has the exact gradient; it reads no
    stored states. On policy all have the rollout's values.

    Args:
        model: a causal language model that thinks, also a PEFT one, or wrapped for data parallel training.
        input_ids, attention_mask: (B, L).
        thinking_states: (B, K, d), as for the model's forward; "all" needs none.
        thinking_mask: (B, K) bool, K < L for more than one pass.
        passes: a whole number from 1, or "all".
        temperature: of the rollout, for the embedding residual.
        kwargs: for the model, e.g. labels or logits_to_keep.

    Returns:
        The model's output, of the last pass.

    Raises:
        InputError: the shapes do not fit, a dropout is at work in more than one pass, or the model cannot do these.
    """
    if cached := [name for name in ("past_key_values", "cache") if kwargs.get(name) is not None]:
        raise InputError(f"a replay reads whole sequences; leave {cached[0]} out.")
    inner = causal_lm(model)
    residual = kwargs.pop("thinking_residual", None) or thinking_backbone(inner).config.thinking["residual"]
    return model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        thinking_states=thinking_states,
        thinking_mask=thinking_mask,
        thinking_residual=residual,
        **passes_inputs(inner, passes, residual, temperature),
        **{"use_cache": False} | kwargs,
    )


@torch.no_grad()
def thinking_roll(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    thinking_mask: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """The states (B, K, d) of a model that thinks given tokens: what a rollout of the same tokens would have stored.

    Args:
        model, input_ids, attention_mask, thinking_mask, temperature: as for `replay_forward`.
    """
    inner = causal_lm(model)
    residual = thinking_backbone(inner).config.thinking["residual"]
    out = replay_forward(
        model,
        input_ids,
        attention_mask,
        thinking_mask=thinking_mask,
        passes="all",
        temperature=temperature,
        output_last_hidden_state=True,
        logits_to_keep=1,
    )
    head = distribution_head(inner, residual, temperature)
    return live_states(out.last_hidden_state, thinking_mask.shape[1], head)
