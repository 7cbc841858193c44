"""A replay: one parallel forward over prompts and completions that thinks as their rollout did.

The rollout keeps states, not residuals: the replay makes the residuals again with today's weights, which carries the
gradient to the projection. How far it flows on, through the states, is `bptt`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hrpo_patches.thinking.adjoint import ready
from hrpo_patches.thinking.backbone import causal_lm, thinking_backbone
from hrpo_patches.thinking.sequential import Head
from hrpo_patches.thinking.shards import head_of, weight_of
from hrpo_thinking.errors import InputError
from hrpo_thinking.inputs import Bptt, Depth, ThinkingInputs, depth_of
from hrpo_thinking.parts import RESIDUALS, ResidualKind

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class DistributionHead:
    """Makes what a residual keeps of last hidden states, with the gradient through the distribution.

    Args:
        model: the causal language model.
        kind: the residual.
        temperature: of the rollout; its distribution is taken over the whole vocabulary.
    """

    def __init__(self, model: PreTrainedModel, kind: ResidualKind, temperature: float = 1.0) -> None:
        self.kind = kind
        self.head, self.temperature = head_of(model), temperature
        self.table = model.get_input_embeddings()
        self.vocabulary = model.config.vocab_size

    def __call__(self, states: Tensor) -> Tensor:
        logits = self.head(states)
        # As transformers' logits processors see them, in float32; the softmax follows in `observe`.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature
        return self.kind.observe(states, logits, weight_of(self.table))


def distribution_head(model: PreTrainedModel, residual: str, temperature: float) -> Head | None:
    """What makes residuals of live states, where the state alone does not do."""
    kind = RESIDUALS[residual]
    return None if kind.needs_state else DistributionHead(model, kind, temperature)


def replay_forward(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    thinking_states: Tensor | None = None,
    thinking_mask: Tensor,
    thinking_residual: str | None = None,
    bptt: Depth = 0,
    bptt_tolerance: float = Bptt.tolerance,
    bptt_terms: int = Bptt.terms,
    stale: bool = False,
    temperature: float = 1.0,
    observe: Callable[[dict[str, float]], None] | None = None,
    **kwargs: Any,
) -> Any:
    """A forward over prompts and completions whose thinking positions are replayed.

    Backpropagation through time (BPTT): with `bptt=0` the stored states are constants, and the gradient reaches
    whoever reads a thought (the published gradient). With `bptt=k` it also flows back through k thoughts (truncated
    BPTT), and with "exact" through all of them, by the adjoint series of `thinking/adjoint.py`. "sequential" is the
    same gradient by decoding the thoughts one by one. The values are those of the rollout, if the weights still are.

    Args:
        model: a causal language model that thinks, also a PEFT one, or wrapped for data parallel training.
        input_ids: (B, L).
        attention_mask: (B, L).
        thinking_states: (B, K, d), what each position's residual is made from. None, for supervised text: the tokens
            are thought first, without gradient (`thinking_roll`).
        thinking_mask: (B, K) bool, aligned with the last K input positions; K < L unless `bptt` is 0.
        thinking_residual: what the states are; by default what the model's config says.
        bptt: 0, a number of thoughts, "exact", or "sequential".
        bptt_tolerance: of "exact", the norm of the first term left out over the ordinary gradient's at the hidden
            states, as expected from the last two.
        bptt_terms: after how many terms "exact" warns of a series that does not converge.
        stale: whether the states were made by other weights (off policy); then they are computed again first, without
            gradient, so that values and gradient are exact for today's weights.
        temperature: of the rollout, for the embedding residual.
        observe: called in the backward with `bptt/terms`, `bptt/remainder` (the expected norm of the first term left
            out, over the first one's) and `bptt/gain` (the norm of the whole gradient over the published one's, at
            the hidden states).
        kwargs: for the model, e.g. labels or logits_to_keep.

    Returns:
        The model's output.

    Raises:
        InputError: the shapes do not fit, or the model cannot take this gradient.
    """
    if cached := [name for name in ("past_key_values", "cache") if kwargs.get(name) is not None]:
        raise InputError(f"a replay reads whole sequences; remove {cached[0]}.")
    inner, depth = causal_lm(model), depth_of(bptt)  # `model` itself is called: DDP and FSDP have hooks there
    residual = thinking_residual or thinking_backbone(inner).config.thinking["residual"]
    if thinking_states is not None:
        thinking_states = thinking_states.detach()  # the gradient through them is `rule`'s, never that of a rollout
    rule = None  # the published gradient: states are constants
    if depth or stale or thinking_states is None:
        head = distribution_head(inner, residual, temperature)
        rule = Bptt(depth, bptt_tolerance, bptt_terms, stale, head, observe)
    return model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        thinking_inputs=ThinkingInputs(thinking_states, thinking_mask, residual, rule),
        **{"use_cache": False} | kwargs,
    )


@torch.no_grad()
def thinking_roll(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    thinking_mask: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """The states (B, K, d) of a model that thinks given tokens: what a rollout of the same tokens would have stored.

    They are decoded one by one, in evaluation mode. Columns before the first and after the last thinking one are 0.

    Args:
        model: as for `replay_forward`.
        input_ids: (B, L).
        attention_mask: (B, L).
        thinking_mask: (B, K) bool.
        temperature: of the rollout, for the embedding residual.
    """
    inner = causal_lm(model)
    backbone = thinking_backbone(inner)
    residual = backbone.config.thinking["residual"]
    rule = Bptt(head=distribution_head(inner, residual, temperature))  # of depth 0: no gradient is wanted
    embeds = backbone.get_input_embeddings()(input_ids)
    thinking = ready(backbone, embeds, ThinkingInputs(None, thinking_mask, residual, rule), attention_mask, None)
    assert thinking.states is not None
    return thinking.states
