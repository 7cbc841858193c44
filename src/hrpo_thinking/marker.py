"""Finds the answer marker in a stream of tokens with one table look-up a step.

A Knuth-Morris-Pratt automaton over the marker's bytes, with whole tokens as its letters: state k means that the text
so far ends in the first k bytes of the marker, and the last state, once reached, is never left. So a marker that is
split over tokens, glued to a neighbour or inside a longer token is found exactly, on the device, without decoding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hrpo_thinking.config import ThinkingConfig
from hrpo_thinking.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TABLES: WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[str, int], Tensor]] = WeakKeyDictionary()


def _read(text: bytes, state: int, marker: bytes) -> int:
    """The state after `text`, starting from `state`: of all that was read before, only the state's bytes matter."""
    seen = marker[:state] + text
    if marker in seen:
        return len(marker)
    tail = seen[-len(marker) :]
    while not marker.startswith(tail):
        tail = tail[1:]
    return len(tail)


def _token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, bytes]]:
    """Each token's id and the bytes that it adds to a text."""
    from transformers import StopStringCriteria

    mode = StopStringCriteria._get_stop_string_matching_mode(tokenizer)
    texts, ids = StopStringCriteria.clean_tokenizer_vocab(tokenizer, stop_string_matching_mode=mode)
    return [(i, text if isinstance(text, bytes) else text.encode()) for text, i in zip(texts, ids, strict=True)]


def _check_reachable(table: Tensor, tokenizer: PreTrainedTokenizerBase, marker: str) -> None:
    reached, frontier = {0}, {0}
    while frontier:
        frontier = {int(state) for start in frontier for state in table[:, start].unique()} - reached
        reached |= frontier
    if table.shape[1] - 1 not in reached:
        raise InputError(
            f"no sequence of {type(tokenizer).__name__}'s tokens spells the answer marker {marker!r}, so an answer "
            f"could never start; choose an answer_start that the tokenizer can produce."
        )


def thinking_table(tokenizer: PreTrainedTokenizerBase, thinking: ThinkingConfig, vocab_size: int = 0) -> Tensor:
    """The automaton whose last state ends the thinking: `marker_table`, or, if the forced thoughts alone think, one
    that any token of text ends."""
    table = marker_table(tokenizer, thinking.answer_start, vocab_size)
    return table if thinking.span == "marker" else torch.full_like(table, table.shape[1] - 1)


def marker_table(tokenizer: PreTrainedTokenizerBase, marker: str, vocab_size: int = 0) -> Tensor:
    """The automaton of `marker`: next state by token id and state.

    Args:
        tokenizer: whose tokens are read. The table is kept for as long as the tokenizer lives.
        marker: a non-empty text.
        vocab_size: at least so many rows, for models whose vocabulary is padded; a padding id reads as foreign text.

    Returns:
        int64 (V, m + 1) on the CPU, m the marker's length in UTF-8 bytes. Column m holds m.

    Raises:
        InputError: the tokenizer cannot produce the marker.
    """
    tables = _TABLES.setdefault(tokenizer, {})
    key = (marker, vocab_size)
    if key not in tables:
        needle = marker.encode()
        tokens = _token_bytes(tokenizer)
        table = torch.zeros(max(vocab_size, 1 + max(i for i, _ in tokens)), len(needle) + 1, dtype=torch.long)
        table[:, -1] = len(needle)
        letters = set(needle)
        for i, text in tokens:
            if not text:
                table[i] = torch.arange(len(needle) + 1)
            elif not letters.isdisjoint(text):
                table[i] = torch.tensor([_read(text, k, needle) for k in range(len(needle) + 1)])
        _check_reachable(table, tokenizer, marker)
        tables[key] = table
    return tables[key]
