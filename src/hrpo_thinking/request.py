"""What one request of an engine has thought so far: states, marker, forced thoughts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hrpo_thinking.errors import InputError
from hrpo_thinking.parts import RESIDUALS

FORCED_ALONE = "only generate supports forced thoughts without thinking; use it, or set thoughts=0."
PIECE = 64  # states that are copied together: each is a row of its step's, and would keep all of that alive


class ThinkingRequest:
    """A completion that thinks, token by token. Completion token c has the index c, forced thoughts included.

    A record outlives what an engine forgets: a request that is preempted and computed again finds its states here.

    Args:
        table: the marker's automaton (`marker.marker_table`), as an array (V, m + 1).
        forced: how many forced thoughts the completion begins with.

    Attributes:
        states: for each token, the state (d) that it was sampled from; one more than there are tokens read.
        mask: for each token that was read, whether it thinks.
        progress: the automaton's state after the tokens that were read.
        replayed: how many thoughts were computed again after a preemption.
    """

    def __init__(self, table: Any, forced: int = 0) -> None:
        self.table, self.forced = table, forced
        self.states: list[Tensor] = []
        self.mask: list[bool] = []
        self.replayed = 0
        self.progress = 0

    def read(self, index: int, token: int) -> bool:
        """Whether token `index` thinks, which is asked in order; one that was read before is being replayed."""
        if index < len(self.mask):
            return self.thinks_again(index)
        if index >= self.forced:  # a filler is not text
            self.progress = int(self.table[token, self.progress])
        self.mask.append(self.progress != self.table.shape[1] - 1)
        return self.mask[index]

    def thinks_again(self, index: int) -> bool:
        """Whether token `index`, which was read before and is now computed again, thinks."""
        self.replayed += self.mask[index]
        return self.mask[index]

    def keep(self, index: int, state: Tensor) -> None:
        """Keep the state (d) that token `index` is sampled from, unless it is kept already."""
        if index == len(self.states):
            self.states.append(state)
            if len(self.states) % PIECE == 0 and len(self.states) > PIECE:  # not the last: they may be on their way
                at = slice(-2 * PIECE, -PIECE)
                self.states[at] = torch.stack(self.states[at]).unbind()

    def resume(self, tokens: list[int]) -> None:
        """The request is computed again with these tokens; what was sampled after them is forgotten."""
        self.states, self.mask, self.progress = self.states[: len(tokens)], [], 0
        for index, token in enumerate(tokens):
            self.read(index, token)

    def forces(self, index: int) -> bool:
        """Whether token `index` is a forced thought."""
        return index < self.forced

    def copy(self, tokens: int) -> ThinkingRequest:
        """A record of its own for a request that shares the first `tokens` tokens with this one."""
        other = ThinkingRequest(self.table, self.forced)
        other.states = self.states[:tokens]
        return other


def check_room(forced: int, room: int, thoughts: str = "thoughts", tokens: str = "max_new_tokens") -> None:
    """Raise `InputError` unless forced thoughts leave a token of a completion of `room` tokens.

    `thoughts` and `tokens` are what the caller's user calls the two numbers.
    """
    if forced and forced >= room:
        raise InputError(f"{thoughts}={forced} must be smaller than {tokens}={room}.")


def check_residual(residual: str, engine: str) -> None:
    """Raise `InputError` for a residual that an engine, which hands over states alone, cannot make."""
    if not RESIDUALS[residual].needs_state:
        raise InputError(
            f"{engine} hands over no distribution, which the {residual} residual is made from; use generate, or "
            f"another residual."
        )
