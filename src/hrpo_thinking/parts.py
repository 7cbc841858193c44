"""Two tables: the thinking modules, and the residuals. Whatever depends on which there are asks here.

A residual of your own is a row: `register(ResidualKind(...))` before the config names it. Tensors are only passed
through here, so that a command line is read without torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, NamedTuple

from hrpo_thinking.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

NONE = "none"  # how a command line and a file spell a run that blends nothing; None inside


class Part(NamedTuple):
    """A thinking module.

    Attributes:
        name: its name on the backbone.
        group: its optimizer group, which has a learning rate.
        residuals: those that train it, by name; None: all.
    """

    name: str
    group: str
    residuals: set[str] | None = None


class ResidualKind(NamedTuple):
    """What a thinking position is blended with.

    Attributes:
        name: as in `ThinkingConfig.residual`.
        needs_state: whether it is made from the last hidden state alone; else from the distribution, too.
        observe: what a rollout keeps of a step (..., d), from hidden (..., d) or None, scores (..., V) and embeddings
            (V, d).
        make: from the backbone and what was kept (..., d), s (..., d).
    """

    name: str
    needs_state: bool
    observe: Callable[[Any, Any, Any], Any]
    make: Callable[[Any, Any], Any]


def embedding_residual(probabilities: Tensor, embeddings: Tensor) -> Tensor:
    """s = (Σ p E) / sqrt(Σ p²), from p (..., V) and E (V, d); the residual of the original HRPO."""
    expected = probabilities.to(embeddings.dtype) @ embeddings
    return expected / probabilities.square().sum(-1, keepdim=True).sqrt().to(embeddings.dtype)


PARTS = (
    Part("thinking_projection", "projection", {"projection"}),
    Part("thinking_residual_gate_r", "gate"),
    Part("thinking_residual_gate_i", "gate"),
    Part("thinking_residual_Lambda", "Lambda"),
)
MODULES = tuple(part.name for part in PARTS)
PROJECTION, GATE_R, GATE_I, LAMBDA = MODULES
RATES = {"gate": 1e-4, "Lambda": 1e-3, "projection": 1e-4}  # each optimizer group's learning rate, as published
GROUP_OF = {part.name: part.group for part in PARTS}
MODULE_PATTERN = re.compile(rf"(^|\.)({'|'.join(MODULES)})\.")

RESIDUALS = {
    kind.name: kind
    for kind in (
        ResidualKind(
            "projection",
            needs_state=True,
            observe=lambda hidden, scores, embeddings: hidden.clone(),  # a view would keep the whole prefill alive
            make=lambda backbone, states: backbone.projected_residual(states),
        ),
        ResidualKind(
            "embedding",
            needs_state=False,
            observe=lambda hidden, scores, embeddings: embedding_residual(scores.softmax(-1), embeddings),
            make=lambda backbone, states: states,
        ),
    )
}
FALLBACK = "embedding"  # of a generation whose forward returns no last hidden state


def register(kind: ResidualKind, trains: Collection[str] = ()) -> None:
    """Add a residual.

    Args:
        kind: its row.
        trains: the thinking modules that it makes `s` with, by name, beside those that every residual trains.

    Raises:
        InputError: there is one of that name, or no such module.
    """
    if kind.name in RESIDUALS or kind.name == NONE:
        raise InputError(f"there is a residual {kind.name!r} already; give yours another name.")
    if unknown := sorted(set(trains) - set(MODULES)):
        raise InputError(f"unknown thinking module {unknown[0]!r}; expected one of {', '.join(MODULES)}.")
    RESIDUALS[kind.name] = kind
    for part in PARTS:
        if part.residuals is not None and part.name in trains:
            part.residuals.add(kind.name)


def residual_of(given: str | None) -> str | None:
    """The residual of that name, None for "none"; an `InputError` if it is unknown."""
    if given is None or given == NONE:
        return None
    if given not in RESIDUALS:
        raise InputError(f"residual must be one of {(*RESIDUALS, NONE)}, not {given!r}.")
    return given


def spelled(residual: str | None) -> str:
    """A residual as a command line and a file spell it."""
    return residual if residual is not None else NONE


def parts_of(residual: str | None) -> list[str]:
    """The thinking modules that a run with this residual trains and saves, by name; none for plain GRPO."""
    rows = PARTS if residual is not None else ()
    return [part.name for part in rows if part.residuals is None or residual in part.residuals]


def is_thinking_parameter(name: str) -> bool:
    """Whether a parameter's dotted name, also one that PEFT or DDP has renamed, is a thinking weight's."""
    return MODULE_PATTERN.search(name) is not None


def canonical(name: str) -> str:
    """A thinking parameter's dotted name without what PEFT puts around a trainable copy's."""
    return re.sub(r"\.modules_to_save\.[^.]+", "", name.removeprefix("base_model.model."))


def group_of(name: str) -> str:
    """The group of a parameter by its dotted name: "projection", "gate", "Lambda" or "base"."""
    return next((GROUP_OF[part] for part in name.split(".") if part in GROUP_OF), "base")
