"""What a thought is worth: the same decoding with its residuals replaced.

A control stands between a residual and its blend, in every forward that thinks: `generate`, or a replay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hrpo_patches.thinking.backbone import temporarily, thinking_backbone
from hrpo_thinking.blend import Control
from hrpo_thinking.errors import InputError

if TYPE_CHECKING:
    from hrpo_patches.thinking.backbone import Model

CONTROLS = {
    "live": "the thoughts as they are",
    "zeroed": "no residual: the input is a ⊙ e",
    "off": "no blend: the input is e",
    "swapped": "the residual of another row that still thinks and has another gold answer",
    "mean": "the mean residual of all rows that still think",
    "token": "the token's own embedding as residual: s = e",
}
SEVERAL = ("swapped", "mean")  # which need other rows


def check_control(name: str, batches: Sequence[Sequence[Hashable]]) -> None:
    """Raise `InputError` unless there is such a control, and every batch of gold answers has what it needs.

    Args:
        name: of `CONTROLS`.
        batches: the gold answers of the rows that are decoded together.
    """
    if name not in CONTROLS:
        raise InputError(f"the control must be one of {tuple(CONTROLS)}, not {name!r}.")
    for golds in batches:
        if name in SEVERAL and len(golds) < 2:
            raise InputError(f"the control {name!r} needs other rows, and a batch holds one; change the batch size.")
        if name == "swapped" and 2 * max(Counter(golds).values()) > len(golds):
            raise InputError(
                "the control 'swapped' gives every row the thought of one with another gold answer, but in a batch "
                "more than half have the same; take larger batches or other problems."
            )


@contextmanager
def controlled(model: Model, name: str, golds: Sequence[Hashable] = ()) -> Iterator[list[bool]]:
    """Let `model` think under the control `name`; yields a list that is not empty once the control was applied.

    Args:
        model: a causal language model that thinks, also a PEFT one.
        name: of `CONTROLS`.
        golds: the gold answer of each row, for "swapped".

    Raises:
        InputError: as `check_control`.
    """
    check_control(name, [golds] if name == "swapped" else [])
    backbone = thinking_backbone(model)
    ranks = {gold: i for i, gold in enumerate(dict.fromkeys(golds))}  # equal answers are one group
    groups = torch.tensor([ranks[gold] for gold in golds])
    # Each from residuals (B, K, d), embeddings (B, K, d) and mask (B, K) to the residuals and the mask that are used.
    functions: dict[str, Control] = {
        "zeroed": lambda residual, embeds, mask: (torch.zeros_like(residual), mask),
        "off": lambda residual, embeds, mask: (residual, torch.zeros_like(mask)),
        "swapped": lambda residual, embeds, mask: (_swapped(residual, mask, groups), mask),
        "mean": lambda residual, embeds, mask: (_mean(residual, mask), mask),
        "token": lambda residual, embeds, mask: (embeds.to(residual.dtype), mask),
    }
    applied = [True] if name == "live" else []

    def control(residual: Tensor, embeds: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        applied[:] = [True]
        return functions[name](residual, embeds, mask)

    with temporarily(backbone, thinking_control=None if name == "live" else control):
        yield applied


def _mean(residual: Tensor, mask: Tensor) -> Tensor:
    if len(mask) < 2:
        raise InputError("the control 'mean' needs other rows, and the batch holds one.")
    thinking = torch.where(mask.unsqueeze(-1), residual, 0.0)  # of a column: rows that have answered do not count
    return (thinking.sum(0, keepdim=True) / mask.sum(0).clamp(min=1).view(1, -1, 1)).expand_as(residual)


def _swapped(residual: Tensor, mask: Tensor, groups: Tensor) -> Tensor:
    """Residuals (B, K, d) of which each thinking row has another's; one that has no partner left has none (zeros)."""
    if len(groups) != len(mask):
        raise InputError(f"the control 'swapped' knows {len(groups)} gold answers for a batch of {len(mask)} rows.")
    swapped = torch.zeros_like(residual)
    for column in range(mask.shape[1]):  # fewer rows think in each later one
        rows, donors = partners(mask[:, column].cpu(), groups)
        swapped[rows.to(residual.device), column] = residual[donors.to(residual.device), column]
    return swapped


def partners(thinking: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that think, and for each a row that thinks and is of another group; a bijection.

    Args:
        thinking: (B,) bool.
        groups: (B,), the number of each row's gold answer.

    Returns:
        Two tensors (n,) of row numbers. A group of more than half of the thinking rows is cut to half of them.
    """
    rows = thinking.nonzero().flatten()
    # Sorted by group and rolled by the largest group's size, no row meets its own group if none has more than half.
    order = rows[groups[rows].argsort(stable=True)]
    sizes = groups[order].bincount()
    while len(order) and 2 * int(sizes.max()) > len(order):
        order = order[order != order[groups[order] == sizes.argmax()][-1]]
        sizes = groups[order].bincount()
    return order, order.roll(int(sizes.max()) if len(order) else 0)
