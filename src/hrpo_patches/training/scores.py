"""Log-probabilities and entropies of tokens, a few tokens' logits at a time; knows heads and tensors, no trainers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

LOGITS = 2**24  # that exist at once, whatever the vocabulary; in float32 64 MiB, of which a softmax holds several


def fits(rows: int, width: int, vocabulary: int) -> bool:
    """Whether the logits of `rows` of `width` tokens may all exist at once, which is faster."""
    return rows * width * vocabulary <= LOGITS


def scores(
    head: Callable[[Tensor], Tensor], states: Tensor, tokens: Tensor, temperature: float, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (B, C) of tokens and entropies (B, C), in float32; logits are made anew in the backward.

    Args:
        head: makes logits (n, V) of states (n, d).
        states: (B, C, d), last hidden states, each of the position before its token.
        tokens: (B, C).
        temperature: that logits are divided by.
        vocabulary: V.
    """

    def some(states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(states).float() / temperature
        return selective_log_softmax(logits, tokens), entropy_from_logits(logits.detach())

    size = max(1, LOGITS // vocabulary)
    pieces = zip(states.flatten(0, 1).split(size), tokens.flatten().split(size), strict=True)
    made = [checkpoint(some, *piece, use_reentrant=False) for piece in pieces]
    logps, entropies = (torch.cat(column).view_as(tokens) for column in zip(*made, strict=True))
    return logps, entropies
