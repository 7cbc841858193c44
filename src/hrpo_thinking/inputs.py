"""One value from the rollout to the model: what a forward needs in order to think.

Decoding and the engines produce a `ThinkingInputs`. The trainer keeps its tensors with the batch and, in the loss,
adds how a gradient flows through them (`bptt`). The model's forward reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

from hrpo_thinking.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

# What a forward took until version 0.3, or might be thought to take; its **kwargs would ignore them.
LOOSE_KEYWORDS = frozenset(
    ("thinking_states", "thinking_mask", "thinking_residual", "thinking_passes", "thinking_head", "bptt")
)
LOOSE = (
    "a forward takes no thinking_states, thinking_mask or bptt since version 0.3; call hrpo_patches.replay_forward("
    "model, ...), or pass thinking_inputs=ThinkingInputs(states, mask)."
)

Depth = int | Literal["exact", "sequential"]
FORMS = get_args(get_args(Depth)[1])


@dataclass(frozen=True, eq=False)
class Bptt:
    """Backpropagation through time: how many thoughts back a gradient flows, and by which means.

    Attributes:
        depth: 0, the thinking states are constants (the published gradient); k, truncated after k thoughts; "exact",
            by the adjoint series; "sequential", exact by decoding the thoughts one by one in the graph.
        tolerance: "exact" ends where the next term's norm is expected to be at most this share of the first one's.
        terms: "exact" warns of a series that has not converged after this number of terms, and computes it to its end.
        stale: whether the states were made by other weights, and must be computed again before they are used.
        head: (..., d) -> (..., d), makes residuals from hidden states; None where the state alone is needed.
        observe: called with `bptt/...` measurements, by name, in each backward (and when stale states are computed).
    """

    depth: Depth = 0
    tolerance: float = 1e-3
    terms: int = 32
    stale: bool = False
    head: Callable[[Tensor], Tensor] | None = None
    observe: Callable[[dict[str, float]], None] | None = None

    def __post_init__(self) -> None:
        depth_of(self.depth)
        if not isinstance(self.tolerance, (int, float)) or not 0 <= self.tolerance < 1:
            raise InputError(f"bptt_tolerance must be a number from 0 and below 1, not {self.tolerance!r}.")
        if isinstance(self.terms, bool) or not isinstance(self.terms, int) or self.terms < 1:
            raise InputError(f"bptt_terms must be a whole number from 1, not {self.terms!r}.")


@dataclass(frozen=True, eq=False)
class ThinkingInputs:
    """The thinking of the last K input positions of a forward.

    Attributes:
        states: (B, K, d), what each position's residual is made from: the hidden state that produced its token
            (projection), or the finished residual (embedding). None: the positions think again, one by one.
        mask: (B, K) bool, which positions think.
        residual: what the states are, by name; by default what the model's config says.
        bptt: how a gradient flows through the states; by default they are constants.
    """

    states: Tensor | None
    mask: Tensor
    residual: str | None = None
    bptt: Bptt | None = None

    def aligned(self, width: int) -> ThinkingInputs:
        """The same for completions that were cut or right-padded to `width` tokens."""
        from torch.nn.functional import pad

        extra = width - self.mask.shape[1]  # negative cuts
        states = pad(self.states, (0, 0, 0, extra)) if self.states is not None else None
        return replace(self, states=states, mask=pad(self.mask, (0, extra)))

    def rows(self, rows: slice) -> ThinkingInputs:
        """The same for some rows of the batch."""
        return replace(self, states=self.states[rows] if self.states is not None else None, mask=self.mask[rows])


def depth_of(given: object) -> Depth:
    """`given` as a depth of `Bptt`; a text may hold the number.

    Raises:
        InputError: it is neither a whole number from 0 nor one of the two words.
    """
    number = int(given) if isinstance(given, str) and given.isdecimal() else given
    if isinstance(number, int) and not isinstance(number, bool) and number >= 0:
        return number
    if given in FORMS:
        return given  # type: ignore[return-value]
    raise InputError(f"bptt must be a whole number from 0, 'exact' or 'sequential', not {given!r}.")
