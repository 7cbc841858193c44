"""Starts a projection where it means something: least squares from states to the embeddings of what they predict."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from tqdm import trange

from hrpo_patches.models.backends import backend_of
from hrpo_patches.thinking.backbone import causal_lm, thinking_backbone
from hrpo_thinking.errors import require
from hrpo_thinking.parts import PROJECTION, parts_of

if TYPE_CHECKING:
    from hrpo_patches.thinking.backbone import Model
    from hrpo_patches.training.lessons import Lesson

# The standard deviation of the weights after the fit. The norm of the residual forgives any scale, and Adam does not:
# its first steps are as long as the learning rate, which at least squares' own scale (0.005) destroys the fit.
STD = 0.1
RIDGE = 1e-4  # of the states' mean square
STARTS = ("lstsq", "random")


def fits(residual: str | None, layers: int, norm: bool) -> bool:
    """Whether least squares can start the projection: it is a single linear layer."""
    return residual is not None and PROJECTION in parts_of(residual) and layers == 1 and not norm


def check_fits(residual: str | None, layers: int, norm: bool) -> None:
    """Raise `InputError` unless `fits`."""
    require(
        fits(residual, layers, norm),
        f"projection_start='lstsq' requires residual='projection', projection_layers=1 and no projection_norm, not "
        f"residual={residual!r}, {layers} and {norm}; use projection_start='random'.",
    )


@torch.no_grad()
def states_of(model: Model, rows: Sequence[list[int]], batch_size: int = 16, bf16: bool = False) -> list[Tensor]:
    """The last hidden states (L, d), float32, of texts that a model reads without thinking.

    Args:
        model: a causal language model.
        rows: token ids, each of one text.
        batch_size: texts at once.
        bf16: whether the model runs under autocast, as in training with `bf16`.
    """
    inner, states = causal_lm(model), []
    backbone, training = thinking_backbone(model), model.training
    device = inner.get_input_embeddings().weight.device
    backend_of(inner).set_training(model, False)
    for start in trange(0, len(rows), batch_size, desc="Reading solutions for the projection", delay=5, leave=False):
        batch = rows[start : start + batch_size]
        ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in batch], batch_first=True).to(device)  # (B, L)
        mask = nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in batch], batch_first=True).long().to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            hidden = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        states += [state[: len(row)].float() for state, row in zip(hidden, batch, strict=True)]
    backend_of(inner).set_training(model, training)
    return states


@dataclass(frozen=True)
class Place:
    """A position of a text, and what the residual that is made from its state should be.

    Attributes:
        position: whose hidden state is read.
        tokens: of which the residual is to be the mean embedding.
        weights: of the tokens in this mean, above 0.
    """

    position: int
    tokens: list[int]
    weights: list[float]


@torch.no_grad()
def fit_projection(model: Model, texts: Sequence[tuple[list[int], Sequence[Place]]], bf16: bool = False) -> float:
    """Let `thinking_projection` map states to embeddings, by least squares with a slight ridge.

    Args:
        model: that thinks; it reads the texts without thinking.
        texts: token ids, and their places.
        bf16: whether it reads under autocast.

    Returns:
        What is left over: the squared error over the squared deviation of the embeddings from their mean, 0 to 1.

    Raises:
        InputError: the projection is not a single linear layer, or no text has a place.
    """
    module: Any = thinking_backbone(model).thinking_projection
    copied = isinstance(module, ModulesToSaveWrapper)
    active: Any = module.modules_to_save[module.active_adapters[0]] if copied else module
    text = "projection_start='lstsq' requires"
    require(isinstance(active, nn.Linear), f"{text} projection_layers=1 without projection_norm.")
    require(any(places for _, places in texts), f"{text} at least one text to fit the projection on.")
    embeddings = causal_lm(model).get_input_embeddings()
    device = embeddings.weight.device
    means = []  # of the embeddings that each residual is to be, in float64: (d,) each
    for place in (place for _, places in texts for place in places):
        weights = torch.tensor(place.weights, dtype=torch.float64, device=device)
        means.append(weights @ embeddings(torch.tensor(place.tokens, device=device)).double() / weights.sum())
    states = states_of(model, [row for row, _ in texts], bf16=bf16)
    read = [state[[place.position for place in places]] for state, (_, places) in zip(states, texts, strict=True)]
    inputs, outputs = torch.cat(read).double(), torch.stack(means)  # (n, d) each
    square = inputs.T @ inputs  # the normal equations: (d, d), however many places there are
    # States are nearly collinear: without the ridge, the solution would follow rounding.
    square.diagonal().add_(RIDGE * square.diagonal().mean())
    solution = torch.linalg.solve(square, inputs.T @ outputs)
    error, spread = inputs @ solution - outputs, outputs - outputs.mean(0)
    # y = x @ solution, and a linear layer computes x @ weight.T.
    active.weight.copy_((solution.T * (STD / solution.std())).to(active.weight))
    return float(error.square().sum() / spread.square().sum().clamp(min=1e-30))


def places_of(lessons: Sequence[Lesson], per_step: int) -> list[tuple[list[int], list[Place]]]:
    """The written solutions as token ids, and what each of their thoughts would stand for.

    A thought stands for a `per_step`-th of its step's tokens, and is made from the state before them. Tokens count for
    as much as they are rare: what stands in every step says nothing. With as many thoughts as tokens, a thought stands
    for the token that its state predicts.

    Args:
        lessons: solutions.
        per_step: thoughts that replace a step.
    """
    steps = [step for lesson in lessons for step in lesson.steps]
    count = Counter(token for step in steps for token in set(step))
    texts = []
    for lesson in lessons:
        row, places = list(lesson.prompt), []
        for step in lesson.steps:
            edges = [round(i * len(step) / per_step) for i in range(per_step + 1)]
            for start, end in pairwise(edges):
                if tokens := step[start:end]:
                    rarity = [math.log(len(steps) / count[token]) + 1e-3 for token in tokens]
                    places.append(Place(len(row) + start - 1, tokens, rarity))  # the state before the first of them
            row += step
        texts.append((row, places))
    return texts
