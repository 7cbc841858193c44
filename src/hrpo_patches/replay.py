"""A rollout's thinking, and how the loss replays it; knows tensors, nothing of trainers or text.

The rollout keeps the states, not the residuals: the replay makes the residuals anew with today's weights, which
is what carries the gradient to the projection. The states themselves are constants.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from hrpo_patches.config import Residual


@dataclass
class Rollout:
    """What a rollout's completions thought.

    Attributes:
        states: (B, C, d), the state that produced each completion token (or the finished residual).
        mask: (B, C) bool, which completion tokens think.
        residual: what the states are.
    """

    states: Tensor
    mask: Tensor
    residual: Residual

    def aligned(self, width: int) -> Rollout:
        """The same for completions that were cut or right-padded to `width` tokens."""
        extra = width - self.mask.shape[1]  # negative cuts
        return Rollout(pad(self.states, (0, 0, 0, extra)), pad(self.mask, (0, extra)), self.residual)

    def model_inputs(self, rows: slice = slice(None)) -> dict[str, Any]:
        """Keyword arguments for a forward over `rows` of (prompt + completion), aligned with its last C positions."""
        return {
            "thinking_states": self.states[rows].detach(),
            "thinking_mask": self.mask[rows],
            "thinking_residual": self.residual,
        }
