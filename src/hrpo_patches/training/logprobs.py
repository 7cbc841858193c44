"""Log-probabilities and entropies of tokens, a few tokens' logits at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

from hrpo_patches.thinking.backbone import hands_over_states
from hrpo_patches.thinking.shards import head_of, partitioned
from hrpo_thinking.inputs import ThinkingInputs

LOGITS = 2**24  # that exist at once, whatever the vocabulary; in float32 64 MiB, of which a softmax holds several


def fits(rows: int, width: int, vocabulary: int) -> bool:
    """Whether the logits of `rows` of `width` tokens may all exist at once, which is faster."""
    return rows * width * vocabulary <= LOGITS


def scores(
    head: Callable[[Tensor], Tensor], states: Tensor, tokens: Tensor, temperature: float, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (B, C) of tokens and entropies (B, C), in float32; logits are made again in the backward.

    Args:
        head: makes logits (n, V) of states (n, d).
        states: (B, C, d), last hidden states, each of the position before its token.
        tokens: (B, C).
        temperature: that logits are divided by.
        vocabulary: V.
    """

    def scores_of(states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(states).float() / temperature  # (n, V), n * V at most LOGITS
        return selective_log_softmax(logits, tokens), entropy_from_logits(logits.detach())

    size = max(1, LOGITS // vocabulary)
    pieces = zip(states.flatten(0, 1).split(size), tokens.flatten().split(size), strict=True)
    # Without the checkpoint, the backward of each piece would keep its logits, and all would exist at once.
    rows = [checkpoint(scores_of, *piece, use_reentrant=False) for piece in pieces]
    logps, entropies = (torch.cat(column).view_as(tokens) for column in zip(*rows, strict=True))
    return logps, entropies


def forward_scores(
    model: nn.Module,
    inner: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    width: int,
    temperature: float,
    **inputs: ThinkingInputs | None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (B, C) of the last `width` tokens of a batch, and entropies (B, C), of one forward.

    Args:
        model: called with `inputs`, too.
        inner: the causal language model in it.
        input_ids, attention_mask: (B, L).
        width: C < L.
        temperature: that logits are divided by.
    """
    tokens, vocabulary = input_ids[:, -width:], inner.config.vocab_size
    pieces = hands_over_states(inner) and not partitioned(inner)  # ZeRO-3 takes a frozen head's weight back
    at_once = not pieces or fits(len(tokens), width, vocabulary)
    # One position more than there are tokens: position t predicts token t + 1.
    output = {"logits_to_keep": width + 1} if at_once else {"logits_to_keep": 1, "output_last_hidden_state": True}
    outputs = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **output, **inputs)
    if not at_once:
        return scores(head_of(inner), outputs.last_hidden_state[:, -width - 1 : -1], tokens, temperature, vocabulary)
    logits = outputs.logits[:, :-1].float() / temperature
    return selective_log_softmax(logits, tokens), entropy_from_logits(logits)
