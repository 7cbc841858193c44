"""Backpropagation through time for thoughts: the exact gradient of a parallel forward, by its adjoint.

Let S be the thinking states that a forward reads and h = F(S) its hidden states. On policy S = shift(h): each state is
the hidden state one position earlier. With g = dL/dh of the ordinary backward, the whole gradient is that of

    λ = g + J λ,    J λ = shift((∂F/∂S)ᵀ λ)

in the place of g. F is causal, so that J is nilpotent: λ = g + J g + J² g + ... ends after as many terms as there are
thoughts, and in practice much earlier. Each term is one vector-Jacobian product of the graph that the forward has
built. Term k is the gradient that flows through k thoughts, so that k terms are BPTT truncated after k thoughts.

`ready` runs before the layers and `credited` after them, in one call of the model. What makes a residual of a state
(`Bptt.head`, for the embedding residual) stands between h and S, and takes its own part of the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.utils import logging

from hrpo_patches.thinking.sequential import (
    Head,
    advance,
    checkpoints_layers,
    decoded_states,
    recomputed,
    refuse_dropout,
)
from hrpo_patches.thinking.shards import in_shards, largest, partitioned, unsharded
from hrpo_thinking.errors import InputError
from hrpo_thinking.inputs import Bptt, Depth, ThinkingInputs
from hrpo_thinking.parts import RESIDUALS

if TYPE_CHECKING:  # transformers is importing this module
    from hrpo_patches.thinking.mixin import ThinkingMixin

logger = logging.get_logger(__name__)

_LOGITS = 2**24  # logits that the embedding residual of several thoughts holds at once
GROWS = (
    "The adjoint series of bptt='exact' has not converged after bptt_terms terms and is computed to its end: the "
    "gradient grows from thought to thought. Start from a larger residual_r_min, or set bptt to a small number of "
    "thoughts; with many thoughts, bptt='sequential' is exact and may be faster."
)
_ROUNDING = 4  # a state has converged if it moves by fewer units in the last place of its dtype


def ready(
    backbone: ThinkingMixin,
    embeds: Tensor,
    thinking: ThinkingInputs,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
) -> ThinkingInputs:
    """The inputs with states that are those of today's weights, and that a gradient can be taken with respect to.

    Args:
        backbone: whose forward is running.
        embeds: (B, L, d), the input embeddings.
        thinking: as the forward was given it.
        attention_mask, position_ids: of the forward.

    Raises:
        InputError: the shapes do not fit, or the gradient cannot be taken as `thinking.bptt` asks.
    """
    rule = thinking.bptt or Bptt()
    wanted = bool(rule.depth) and torch.is_grad_enabled()
    sequential = wanted and rule.depth == "sequential"
    if thinking.states is not None and not rule.stale and not wanted:
        return replace(thinking, bptt=None)
    head = _check(backbone, embeds, thinking, rule, attention_mask)
    thinking = replace(thinking, bptt=replace(rule, head=head))
    if sequential:
        refuse_dropout(backbone)
        states = decoded_states(backbone, embeds, thinking, head, attention_mask, position_ids)
        return replace(thinking, states=states, bptt=None)
    if thinking.states is None or rule.stale:
        with torch.no_grad(), _evaluating(backbone):
            states = _todays_states(backbone, embeds.detach(), thinking, attention_mask, position_ids)
        thinking = replace(thinking, states=states)
    if not wanted:
        return replace(thinking, bptt=None)
    assert thinking.states is not None
    leaf = thinking.states.detach().to(embeds.device, copy=True)  # a copy: states may be of inference mode
    return replace(thinking, states=leaf.requires_grad_())


def _check(
    backbone: ThinkingMixin, embeds: Tensor, thinking: ThinkingInputs, rule: Bptt, attention_mask: Tensor | None
) -> Head:
    """Refuse what has no live states; what makes them of hidden states."""
    mask = thinking.mask
    if not hasattr(backbone, "thinking_projection"):
        raise InputError("thinking_inputs were given to a plain model; build or load it with thinking={}.")
    if mask.dim() != 2 or mask.shape[0] != embeds.shape[0] or not 0 < mask.shape[1] < embeds.shape[1]:
        raise InputError(
            f"states of today's weights require a mask (B, K) with 0 < K < L, because the first one comes from the "
            f"position before: expected B, L = {tuple(embeds.shape[:2])}, got {tuple(mask.shape)}."
        )
    if mask.dtype != torch.bool:
        raise InputError(f"the thinking mask must be bool, not {mask.dtype}.")
    if attention_mask is not None and getattr(attention_mask, "shape", None) != embeds.shape[:2]:
        raise InputError("bptt requires an attention_mask (B, L), or none.")
    if partitioned(backbone) and rule.depth not in (0, "sequential"):
        raise InputError(
            "DeepSpeed's ZeRO-3 gives a layer's weights back after one product; use bptt='sequential' or 0."
        )
    for module in backbone.modules() if torch.is_grad_enabled() and rule.depth else ():
        if module.training and getattr(module, "gradient_checkpointing", False):
            refuse_reentrant(getattr(module._gradient_checkpointing_func, "keywords", {}), rule.depth)
    kind = RESIDUALS[thinking.residual or backbone.config.thinking["residual"]]
    if kind.needs_state:
        table: Any = backbone.get_input_embeddings()
        return lambda hidden: kind.observe(hidden, None, table.weight)
    if rule.head is None:
        raise InputError(
            f"the {kind.name} residual of a live state needs the LM head; call hrpo_patches.replay_forward(model, "
            "...), which hands it over."
        )
    return rule.head


def refuse_reentrant(checkpointing: dict[str, Any], depth: Depth) -> None:
    """Raise `InputError` if layers are checkpointed with these options in a way that takes one backward only."""
    if depth not in (0, "sequential") and checkpointing.get("use_reentrant", True):  # torch's default
        raise InputError(
            f"bptt={depth} is not supported with reentrant gradient checkpointing; set gradient_checkpointing_kwargs="
            "{'use_reentrant': False}, or bptt=0."
        )


def live_states(hidden: Tensor, width: int, head: Head) -> Tensor:
    """What the residuals of the last `width` positions are made from: the states (B, K, d) one position earlier."""
    before = hidden[:, -width - 1 : -1]
    if not hasattr(head, "vocabulary"):  # which needs no logits
        return head(before)
    # A few columns at once, and again for the gradient: the head holds (B, columns, V) logits.
    columns = max(1, _LOGITS // (len(before) * head.vocabulary))
    return torch.cat([recomputed(head, chunk) for chunk in before.split(columns, dim=1)], dim=1)


def _todays_states(
    backbone: ThinkingMixin,
    embeds: Tensor,
    thinking: ThinkingInputs,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
) -> Tensor:
    """The states (B, K, d) that today's weights make of the tokens.

    Stale states are repeated through the parallel forward until they stand still, which they do after at most as many
    forwards as there are thoughts, and after two or three where weights have moved by a few optimizer steps.
    """
    rule, states = thinking.bptt, thinking.states
    assert rule is not None and rule.head is not None
    if states is None:
        return decoded_states(backbone, embeds, thinking, rule.head, attention_mask, position_ids)
    states, mask = states.to(embeds.device), thinking.mask.to(embeds.device).unsqueeze(-1)
    still = max(rule.tolerance, _ROUNDING * torch.finfo(states.dtype).eps)
    count, moved = 0, float("inf")
    while moved > still and count < rule.terms:
        count += 1
        blended = backbone.blend_thinking(embeds, replace(thinking, states=states))
        hidden = backbone.forward(
            inputs_embeds=blended, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        new = torch.where(mask, live_states(hidden, mask.shape[1], rule.head), 0).to(states.dtype)
        change = _norm(new - torch.where(mask, states, 0)) / _norm(new).clamp(min=1e-30)
        states, moved = new, _number(change, in_shards(backbone))
    if moved > still:
        count = 0
        states = decoded_states(backbone, embeds, thinking, rule.head, attention_mask, position_ids)
    if rule.observe is not None:
        rule.observe({"bptt/refreshes": count})  # 0: decoded one by one
    return states


def credited(backbone: ThinkingMixin, hidden: Tensor, thinking: ThinkingInputs) -> Tensor:
    """The hidden states (B, L, d), whose backward also carries what flows through the thoughts."""
    assert thinking.states is not None and thinking.bptt is not None and thinking.bptt.head is not None
    live = live_states(hidden, thinking.mask.shape[1], thinking.bptt.head)
    credited: Tensor = _Adjoint.apply(hidden, live, thinking.states, thinking.bptt, backbone)
    return credited


def hidden_in_stretches(
    backbone: ThinkingMixin,
    embeds: Tensor,
    thinking: ThinkingInputs,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
) -> Tensor | None:
    """The hidden states (B, L, d), computed in two forwards: the positions before the last K, then the last K.

    No thought reaches a position before it, so that the products of the series, which end at the states, do not go
    through the first forward. None under gradient checkpointing, which drops keys and values.
    """
    start = embeds.shape[1] - thinking.mask.shape[1]
    if start == 1 or checkpoints_layers(backbone):
        return None
    if position_ids is None:
        position_ids = torch.arange(embeds.shape[1], device=embeds.device).unsqueeze(0)
    seen = attention_mask[:, :start] if attention_mask is not None else None
    before, past = advance(backbone, embeds[:, :start], seen, position_ids[:, :start], [])
    blended = backbone.blend_thinking(embeds[:, start:], thinking)
    after, _ = advance(backbone, blended, attention_mask, position_ids[:, start:], [past])
    return credited(backbone, torch.cat([before, after], dim=1), thinking)


class _Adjoint(torch.autograd.Function):
    """The identity of `hidden`, which hands the gradient of the states on to the live states that they equal."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, live: Tensor, states: Tensor, rule: Bptt, backbone: ThinkingMixin) -> Tensor:
        ctx.save_for_backward(hidden, live, states)
        ctx.rule, ctx.backbone = rule, backbone
        return hidden.view_as(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (hidden, live, states), rule = ctx.saved_tensors, ctx.rule
        together = in_shards(ctx.backbone)  # then each product is one of all processes
        exact, most = rule.depth == "exact", states.shape[1]
        base = _number(_norm(g[:, -states.shape[1] :]), together)  # what stands before the thoughts reaches none
        size, following, count = base, base, 0  # norms of this term and, by its ratio to the one before, of the next
        term, whole, total = g, g, torch.zeros_like(states)
        smallest, most = (rule.tolerance * base, most) if exact else (0.0, min(rule.depth, most))
        # Where nothing leads from a state to the loss, as with a residual that is cut, the product is zeros.
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        while following > smallest and count < most:  # False if it is NaN
            count += 1
            unsharded(ctx.backbone.norm)
            (at_states,) = torch.autograd.grad(hidden, states, term, **options)
            total = total + at_states
            at_states = at_states.to(live.device)
            (term,) = torch.autograd.grad(live, hidden, at_states, **options)
            whole = whole + term
            before, size = size, _number(_norm(term), together)
            following = size * size / before
        unsharded(ctx.backbone.norm)
        if exact and count > rule.terms:
            logger.warning_once(GROWS)
        if rule.observe is not None and base > 0:
            remainder = following / base if count < states.shape[1] else 0.0  # J is nilpotent
            gain = _number(_norm(whole), together) / _number(_norm(g), together)
            rule.observe({"bptt/terms": count, "bptt/remainder": remainder, "bptt/gain": gain})
        return g, total.to(live.device), None, None, None


def _norm(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values, dtype=torch.promote_types(values.dtype, torch.float32))


def _number(norm: Tensor, together: bool) -> float:
    """A norm on the host; the largest of all processes where they must take the same decision."""
    return (largest(norm) if together else norm).item()


@contextmanager
def _evaluating(backbone: nn.Module) -> Iterator[None]:
    """Within, every module is in evaluation mode: states are those of a rollout, which has no dropout."""
    training = [module for module in backbone.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
