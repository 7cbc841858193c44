"""The thoughts of given tokens, decoded one by one; with a gradient, the exact one, by plain backpropagation.

It is the oracle of the adjoint (`thinking/adjoint.py`) and needs no states of a rollout. Every thought waits for the
one before, so that it costs as much as decoding does. The adjoint uses `advance`, too, for parts of its forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache, DynamicLayer

from hrpo_patches.thinking.backbone import temporarily
from hrpo_patches.thinking.shards import anywhere, in_shards
from hrpo_thinking.errors import InputError
from hrpo_thinking.inputs import ThinkingInputs

if TYPE_CHECKING:  # transformers is importing this module
    from hrpo_patches.thinking.mixin import ThinkingMixin

Head = Callable[[Tensor], Tensor]  # last hidden states (..., d) -> finished residuals (..., d)
Stretch = list[tuple[Tensor, Tensor]]  # some columns' keys and values (B, heads, columns, d / heads), by layer

STRETCH = 512  # columns that are read at once where nothing thinks
KEPT = 32  # thoughts of which a backward may keep everything


def refuse_dropout(backbone: ThinkingMixin, today: bool = True) -> None:
    """Raise `InputError` if a dropout is at work, today or when it is trained: each position would draw its own mask,
    and what a backward computes again another one."""
    rates: dict[str, float] = {}
    for path, module in backbone.named_modules():
        if today and not module.training:
            continue
        if module is backbone:
            rates["projection_dropout"] = backbone.config.thinking.get("projection_dropout", 0.0)
        if isinstance(module, nn.Dropout):
            rates[path] = module.p
        for name, value in vars(module).items():  # attention's, and those of PEFT's other adapters
            if "dropout" in name:
                values = value.values() if isinstance(value, dict) else [value]
                rates |= {f"{path}.{name}": rate for rate in values if isinstance(rate, float)}
    if used := [name for name, rate in rates.items() if rate]:
        raise InputError(f"bptt='sequential' requires all dropout at 0, and {used[0]} is {rates[used[0]]}.")


def recomputed(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` with activation checkpointing: only its arguments are kept for the backward."""
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def decoded_states(
    backbone: ThinkingMixin,
    embeds: Tensor,
    thinking: ThinkingInputs,
    head: Head,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
) -> Tensor:
    """The states (B, K, d) of a model that thinks these positions again, one by one; with gradient if enabled.

    Before the first thinking column, columns are read in parallel. Of many thoughts, or under gradient checkpointing,
    a backward keeps keys, values and states alone and computes the rest again: what attention saves would grow with
    the square of the thoughts.

    Args:
        backbone: whose forward is running.
        embeds: (B, L, d), the input embeddings.
        thinking: which of the last K < L positions think, and with which residual; its states are not read.
        head: makes states, or finished residuals, of hidden states.
        attention_mask, position_ids: of the forward.

    Returns:
        States from the first to the last thinking column; zeros elsewhere.
    """
    mask = thinking.mask.to(embeds.device)
    length, width = embeds.shape[1], mask.shape[1]
    columns = anywhere(backbone, mask.any(0)).nonzero().flatten().tolist()
    states = [embeds.new_zeros(len(embeds), 1, embeds.shape[2])] * width
    if not columns:  # in no process, if the weights are in shards
        return torch.cat(states, dim=1)
    first, last = length - width + columns[0], length - width + columns[-1]
    if position_ids is None:
        position_ids = torch.arange(length, device=embeds.device).unsqueeze(0)
    saves_memory = last - first >= KEPT or checkpoints_layers(backbone)
    if in_shards(backbone):
        head = partial(recomputed, head)  # by the time of its backward, the weights that it read have been given back
    past: list[Stretch] = []  # keys and values so far, a stretch of columns at a time
    hidden: Tensor | None = None
    start = 0
    for end in [*range(STRETCH, first, STRETCH), *range(first, last + 1)]:
        step: Callable[..., Any] = partial(advance, backbone)
        if start >= first:
            assert hidden is not None
            column = start - length + width
            states[column] = head(hidden[:, -1:]).to(embeds.device)
            now = ThinkingInputs(states[column], mask[:, column : column + 1], thinking.residual)
            step = partial(_think_and_advance, backbone, now, backbone.thinking_control)
        seen = attention_mask[:, :end] if attention_mask is not None else None  # grows with the cache
        given = (embeds[:, start:end], seen, position_ids[:, start:end], list(past))
        hidden, own = recomputed(step, *given) if saves_memory else step(*given)
        past.append(own)
        start = end
    assert hidden is not None
    states[columns[-1]] = head(hidden[:, -1:]).to(embeds.device)
    return torch.cat(states, dim=1)


def _think_and_advance(
    backbone: ThinkingMixin, thinking: ThinkingInputs, control: Any, inputs: Tensor, *rest: Any
) -> tuple[Tensor, Stretch]:
    """`advance` by one column (B, 1, d) that thinks.

    The control is that of the forward: a backward may compute this again when the control is gone.
    """
    with temporarily(backbone, thinking_control=control):
        blended = backbone.blend_thinking(inputs, thinking)
    return advance(backbone, blended, *rest)


def advance(
    backbone: ThinkingMixin,
    inputs: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor,
    past: list[Stretch],
) -> tuple[Tensor, Stretch]:
    """The hidden states of the next columns, and their own keys and values, given those of the stretches before."""
    layers: Any = [_Columns([stretch[i] for stretch in past]) for i in range(backbone.config.num_hidden_layers)]
    name = (
        "cache" if "cache" in signature(backbone.forward).parameters else "past_key_values"
    )  # until transformers 5.24
    with _layers_not_checkpointed(backbone):
        out = backbone.forward(
            inputs_embeds=inputs,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=True,
            **{name: Cache(layers=layers)},
        )
    return out.last_hidden_state, [layer.own for layer in layers]


class _Columns(DynamicLayer):
    """A layer of a cache whose columns stay tensors of their own, so that a gradient finds each of them whole."""

    own: tuple[Tensor, Tensor]

    def __init__(self, before: Stretch) -> None:
        super().__init__()
        self.before = before

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.own = (key_states, value_states)
        keys, values = zip(*self.before, self.own, strict=True)
        return torch.cat(keys, dim=-2), torch.cat(values, dim=-2)

    def get_seq_length(self) -> int:
        return sum(keys.shape[-2] for keys, _ in self.before)


def checkpoints_layers(backbone: nn.Module) -> bool:
    """Whether gradient checkpointing is on."""
    return any(getattr(module, "gradient_checkpointing", False) for module in backbone.modules())


@contextmanager
def _layers_not_checkpointed(backbone: nn.Module) -> Iterator[None]:
    """A layer under gradient checkpointing drops its cache; `recomputed` saves the memory instead."""
    layers: Any = [module for module in backbone.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in layers:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in layers:
            module.gradient_checkpointing = True
