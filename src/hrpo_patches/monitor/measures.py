"""What can be measured of a model that thinks.

Every function works on a sample, without gradients, and leaves the random state alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from hrpo_patches.thinking.mixin import ThinkingMixin
from hrpo_patches.thinking.shards import plain
from hrpo_thinking.blend import EPS
from hrpo_thinking.modules import ThinkingLinear
from hrpo_thinking.parts import RESIDUALS, embedding_residual, group_of

GATES_AT = 256  # positions that a and i are measured at
RESIDUALS_AT = 16  # positions that residuals are compared at: each costs two products with the (V, d) embeddings


def summary(name: str, values: Tensor) -> dict[str, Tensor]:
    """`name`/mean, `name`/min and `name`/max of the values."""
    return {f"{name}/mean": values.mean(), f"{name}/min": values.min(), f"{name}/max": values.max()}


def effective_rank(weight: Tensor) -> Tensor:
    """(Σσ²)² / Σσ⁴ over the singular values σ of `weight` (m, n): between 1 and min(m, n).

    The participation ratio of the squared singular values: one matrix product where an entropy would need them all.
    A random d × d matrix has d / 2.
    """
    gram = weight.float() @ weight.float().T
    return gram.trace().square() / gram.square().sum()


def gradient_norms(model: nn.Module) -> dict[str, Tensor]:
    """The norm of the gradient of each group that has one: base (LoRA), gate, Lambda, projection."""
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            groups.setdefault(group_of(name), []).append(parameter.grad)
    return {f"{group}/grad_norm": plain(nn.utils.get_total_norm(grads)) for group, grads in groups.items()}


@torch.no_grad()
def measure_weights(backbone: ThinkingMixin, start: dict[str, Tensor]) -> dict[str, Tensor]:
    """projection/weight_norm, /drift and /effective_rank, the range of Λ, and decay/* of λ.

    The norm is that of all weights of the projection; the drift is the distance from `start` over the norm there, left
    out without a `start`; the rank is the (last) linear layer's. λ is the share of an embedding that is left at
    a fully open gate.
    """
    Lambda = backbone.thinking_residual_Lambda.Lambda
    values = {"Lambda/min": Lambda.min(), "Lambda/max": Lambda.max()}
    values |= summary("decay", backbone.thinking_residual_Lambda.decay())
    weights = projection_weights(backbone)
    if not weights or any(not weight.numel() for weight in weights.values()):  # not trained, or sharded
        return values
    now = torch.cat([weight.flatten() for weight in weights.values()])
    linear = [part for part in backbone.thinking_projection.modules() if isinstance(part, ThinkingLinear)]
    *_, last = [part for part in linear if part.weight.requires_grad]
    values |= {"projection/weight_norm": now.norm(), "projection/effective_rank": effective_rank(last.weight)}
    if start.keys() == weights.keys():
        then = torch.cat([start[name].flatten() for name in weights]).to(now.device)
        values["projection/drift"] = (now - then).norm() / then.norm()
    return values


def projection_weights(backbone: ThinkingMixin) -> dict[str, Tensor]:
    """The projection's weights that are trained, by name."""
    named = backbone.thinking_projection.named_parameters()
    return {name: parameter.detach() for name, parameter in named if parameter.requires_grad}


@torch.no_grad()
def measure_blend(
    backbone: ThinkingMixin, head: Callable[[Tensor], Tensor] | None, inputs: dict[str, Any], temperature: float = 1.0
) -> dict[str, Tensor]:
    """Gates and residuals at a sample of the thinking positions of one forward.

    Args:
        backbone: the model's, with the thinking modules.
        head: gives logits (..., V) from states; None leaves the comparison of the two residuals out.
        inputs: the keyword arguments of the backbone's forward.
        temperature: of the sampling. Top-k, top-p and other processors of the rollout are not redone.

    Returns:
        a/* and i/*; cosine/token, of the residual and the embedding of the token that was sampled; cosine/embedding,
        of the projected and the embedding residual of the same decoding step. Empty if no position thinks; without
        the cosines if the forward was given no states.
    """
    thinking = inputs["thinking_inputs"]
    states, mask = thinking.states, thinking.mask
    width = mask.shape[1]
    positions = mask.flatten().nonzero()[:, 0]
    if not len(positions):
        return {}
    sample = _spread(positions, GATES_AT)
    embeds = inputs.get("inputs_embeds")
    if embeds is None:
        e = backbone.get_input_embeddings()(inputs["input_ids"][:, -width:].flatten()[sample])
    else:
        e = embeds[:, -width:].flatten(0, 1)[sample]
    e = e.to(backbone.thinking_residual_Lambda.Lambda.dtype)
    values = summary("a", backbone.thinking_decay(e))
    values |= summary("i", torch.sigmoid(backbone.thinking_residual_gate_i(e)))

    if states is None:  # of given tokens, which the forward itself thinks
        return values
    few = _spread(torch.arange(len(e), device=e.device), RESIDUALS_AT)
    state = states.flatten(0, 1)[sample][few]
    kind = thinking.residual or backbone.config.thinking["residual"]
    residual = RESIDUALS[kind].make(backbone, state).float()
    values["cosine/token"] = cosine_similarity(residual, e[few], eps=EPS).mean()
    if RESIDUALS[kind].needs_state and head is not None:
        table: Any = backbone.get_input_embeddings().weight
        logits = head(state.to(table.dtype)).float()
        other = embedding_residual((logits / temperature).softmax(-1), table)
        values["cosine/embedding"] = cosine_similarity(residual, other.float(), eps=EPS).mean()
    return values


def _spread(positions: Tensor, count: int) -> Tensor:
    """At most `count` of the positions, evenly spread."""
    steps = torch.linspace(0, len(positions) - 1, min(count, len(positions)), device=positions.device)
    return positions[steps.long()]


def marker_rate(inputs: dict[str, Any]) -> Tensor:
    """The share of sequences in which a position that does not think follows one that does, before the padding."""
    mask = inputs["thinking_inputs"].mask
    attention = inputs.get("attention_mask")
    real = torch.ones_like(mask) if attention is None or attention.ndim != 2 else attention[:, -mask.shape[1] :].bool()
    return ((mask.cumsum(dim=1) > 0) & ~mask & real).any(dim=1).float().mean()
