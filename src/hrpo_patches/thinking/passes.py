"""Credit through time: replays whose thoughts come from live states; knows a backbone, nothing of trainers or text.

The first pass reads the rollout's stored states, which are constants: its gradient reaches whoever reads a thought and
never what was written into it. Here the residuals are made from states of the same graph, so that it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache, DynamicLayer

from hrpo_patches.thinking.backbone import temporarily
from hrpo_patches.thinking.shards import anywhere, in_shards
from hrpo_thinking.errors import InputError

if TYPE_CHECKING:  # transformers is importing this module
    from hrpo_patches.thinking.mixin import ThinkingMixin

Passes = int | Literal["all"]
Head = Callable[[Tensor], Tensor]  # last hidden states (..., d) -> finished residuals (..., d)

Stretch = list[tuple[Tensor, Tensor]]  # some columns' keys and values (B, heads, columns, d / heads), by layer

STRETCH = 512  # columns that are read at once where nothing thinks
KEPT = 32  # thoughts of which a backward may keep everything
_LOGITS = 2**24  # logits that the embedding residual of several thoughts holds at once


def check_passes(passes: Any) -> None:
    """Raise `InputError` unless `passes` is a whole number from 1, or "all"."""
    if passes != "all" and (isinstance(passes, bool) or not isinstance(passes, int) or passes < 1):
        raise InputError(f"replay passes have to be a whole number from 1, or 'all', not {passes!r}.")


def refuse_dropout(backbone: ThinkingMixin, today: bool = True) -> None:
    """Raise `InputError` if a dropout is at work, today or when it is trained: each pass would draw another mask."""
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
        raise InputError(
            f"more than one replay pass needs all dropout at 0, for each pass would draw another mask: {used[0]} is "
            f"{rates[used[0]]}."
        )


def live_states(hidden: Tensor, width: int, head: Head | None) -> Tensor:
    """What the residuals of the last `width` positions are made from: the states (B, L, d) one position earlier."""
    before = hidden[:, -width - 1 : -1]
    if head is None:
        return before
    # A few columns at once, and once more for the gradient: the head holds (B, columns, V) logits.
    columns = max(1, _LOGITS // (len(before) * getattr(head, "vocabulary", 2**15)))
    return torch.cat([_again(head, chunk) for chunk in before.split(columns, dim=1)], dim=1)


def _again(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, of which a backward keeps the arguments and computes the rest anew."""
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def inputs_of_last_pass(
    backbone: ThinkingMixin,
    embeds: Tensor,
    states: Tensor,
    mask: Tensor,
    residual: str,
    passes: int,
    head: Head | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
) -> Tensor:
    """The blended inputs (B, L, d) of the last of `passes` passes; each but the first is made from the one before.

    Args:
        backbone: whose forward is running.
        embeds: (B, L, d), the input embeddings.
        states, mask, residual: as for `ThinkingMixin.blend_thinking`; read in the first pass.
        head: makes finished residuals of states; needed where `residual` needs the distribution.
        attention_mask, position_ids: of the forward.
    """
    for _ in range(passes - 1):
        blended = backbone.blend_thinking(embeds, states, mask, residual)
        hidden = backbone.forward(
            inputs_embeds=blended, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        states = live_states(hidden, mask.shape[1], head)
    return backbone.blend_thinking(embeds, states, mask, residual)


def one_by_one(
    backbone: ThinkingMixin,
    embeds: Tensor,
    mask: Tensor,
    residual: str,
    head: Head | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
) -> Tensor:
    """The last hidden states (B, L, d) of a model that thinks these positions anew, one after the other.

    Before the first thinking column and after the last one, columns are read in parallel. Of many thoughts, or under
    gradient checkpointing, a backward keeps keys, values and states alone, and computes the rest anew: what attention
    saves would grow with the square of the thoughts.

    Args:
        backbone, embeds, head, attention_mask, position_ids: as for `inputs_of_last_pass`.
        mask: (B, K) bool, which of the last K positions think.
        residual: how.
    """
    length, width = embeds.shape[1], mask.shape[1]
    columns = anywhere(backbone, mask.any(0)).nonzero().flatten().tolist()
    columns = columns or [0]  # DDP wants every weight used, also if nobody thinks
    first, last = length - width + columns[0], length - width + columns[-1]
    if position_ids is None:
        position_ids = torch.arange(length, device=embeds.device).unsqueeze(0)
    ends = [*range(STRETCH, first, STRETCH), *range(first, last + 2), *range(last + 1 + STRETCH, length, STRETCH)]
    checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in backbone.modules())
    recomputed = last - first >= KEPT or checkpointed
    if head is not None and in_shards(backbone):
        head = partial(_again, head)  # by the time of its backward, the weights that it read have been given back
    past: list[Stretch] = []
    hidden: list[Tensor] = []
    start = 0
    for end in [*ends, length]:
        if start == end:
            continue
        inputs = embeds[:, start:end]
        if first <= start <= last:
            state = hidden[-1][:, -1:]
            column = start - length + width
            thinks = (mask[:, column : column + 1], residual, head, backbone.thinking_control)
            advance = partial(_think_and_advance, backbone, thinks, state)
        else:
            advance = partial(_advance, backbone)
        seen = attention_mask[:, :end] if attention_mask is not None else None
        given = (inputs, seen, position_ids[:, start:end], list(past))
        states, own = _again(advance, *given) if recomputed else advance(*given)
        hidden.append(states)
        past.append(own)
        start = end
    return torch.cat(hidden, dim=1)


def _think_and_advance(
    backbone: ThinkingMixin,
    thinks: tuple[Tensor, str, Head | None, Any],
    state: Tensor,
    inputs: Tensor,
    *rest: Any,
) -> tuple[Tensor, Stretch]:
    """`_advance` by one column that thinks where its mask (B, 1) says so, from the `state` (B, 1, d) before it.

    The control is that of the forward, for a backward may compute this anew when the control is gone.
    """
    mask, residual, head, control = thinks
    made_from = state if head is None else head(state)
    with temporarily(backbone, thinking_control=control):
        blended = backbone.blend_thinking(inputs, made_from, mask, residual)
    return _advance(backbone, blended, *rest)


def _advance(
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


@contextmanager
def _layers_not_checkpointed(backbone: nn.Module) -> Iterator[None]:
    """A layer under gradient checkpointing drops its cache; `_again` recomputes what it would anyway."""
    layers: Any = [module for module in backbone.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in layers:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in layers:
            module.gradient_checkpointing = True
