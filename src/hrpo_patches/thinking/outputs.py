"""What a forward and a generation hand over where they think; where they do not, stock's own classes are untouched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.modeling_outputs import CausalLMOutputWithPast


@dataclass
class ThinkingCausalLMOutput(CausalLMOutputWithPast):
    """A forward's output with `output_last_hidden_state=True`.

    Attributes:
        last_hidden_state: (B, L, d), after the final norm: what the logits were computed from.
    """

    last_hidden_state: torch.Tensor | None = None


@dataclass
class ThinkingDecoderOnlyOutput(GenerateDecoderOnlyOutput):
    """A generation's output with `thinking=True`; column c belongs to completion token c.

    Attributes:
        thinking_states: (B, C, d), what each token's residual is made from; see `thinking_residual`.
        thinking_mask: (B, C) bool, which tokens think: not yet answering, not padding.
        thinking_ratio: (B, C) float32, the share of the token's embedding in its input, 1 where it does not think.
        thinking_residual: the residual that was really used, by name.
        attention_mask: (B, P + C) of `sequences`: 0 at the padding of prompts and behind the end of completions.
    """

    thinking_states: torch.Tensor | None = None
    thinking_mask: torch.Tensor | None = None
    thinking_ratio: torch.Tensor | None = None
    thinking_residual: str | None = None
    attention_mask: torch.Tensor | None = None


def causal_lm_output(last_hidden_state: torch.Tensor | None, **fields: Any) -> CausalLMOutputWithPast:
    """Called by a patched causal language model's forward: stock's output, or ours with the last hidden state."""
    if last_hidden_state is None:
        return CausalLMOutputWithPast(**fields)
    return ThinkingCausalLMOutput(**fields, last_hidden_state=last_hidden_state)
