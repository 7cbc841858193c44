"""What an engine is: prompts in, completions with their thoughts out.

An engine takes its sampling as transformers' `GenerationConfig`, which the patches extend: `sampling_of` makes one for
an evaluation, TRL makes that of a training run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from hrpo_patches.thinking.backbone import causal_lm
from hrpo_patches.thinking.decoding import ends_of
from hrpo_thinking.errors import InputError
from hrpo_thinking.inputs import ThinkingInputs

if TYPE_CHECKING:
    from hrpo_patches.thinking.backbone import Model
    from hrpo_patches.thinking.decoding import Sampling
else:
    Sampling = GenerationConfig

NOT_FINITE = "probability tensor"  # torch's words where logits are not finite; `torch.multinomial` has no type for it


@dataclass
class Completions:
    """What an engine returns for a list of B prompts, in their order.

    Attributes:
        tokens: ids of each completion, without forced thoughts, up to and with its end token.
        logprobs: of these tokens, as they were sampled; None where the engine does not return them.
        thinking: states (B, C, d) and mask (B, C) of every completion token, forced thoughts included; None where
            the completions did not think, or the sampling did not ask for it (`return_dict_in_generate`).
        ratio: (B, C) float32, the mean share of the embedding in each token's input; None as `thinking`.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]] | None = None
    thinking: ThinkingInputs | None = None
    ratio: Tensor | None = None

    def shares(self) -> Tensor:
        """Over the positions that think: the sums of a and of sqrt(1 - a²), and their number; (3,)."""
        assert self.thinking is not None and self.ratio is not None
        mask = self.thinking.mask
        a = torch.where(mask, self.ratio, 0.0)  # (B, C); means are taken later, over all processes
        hidden = torch.where(mask, torch.sqrt(1 - a.square()), 0.0)  # the residual's share
        return torch.stack([a.sum(), hidden.sum(), mask.sum().float()])


def check_prompts(prompts: list[list[int]]) -> None:
    """Raise `InputError` unless there are prompts, and each has a token."""
    if not prompts or not all(prompts):
        raise InputError(
            "every prompt must have a token, and there must be one: the first thought is made from its last."
        )


class Engine(Protocol):
    """Completes prompts with one model. It samples from torch's global generator, or seeds itself from that."""

    def complete(self, prompts: list[list[int]], sampling: Sampling) -> Completions:
        """Complete prompts, together; returns one completion per prompt.

        Args:
            prompts: token ids of each (`check_prompts`).
            sampling: how. A completion has at most `max_new_tokens` tokens, of which the first `thoughts` are forced
                and are not returned. With `return_dict_in_generate` the completions have their thinking states.

        Raises:
            InputError: a prompt is empty.
            RuntimeError: the engine failed; the message holds `NOT_FINITE` if it sampled from logits that were not
                finite. A greedy completion is not checked.
        """

    def refresh_weights(self) -> None:
        """Take the weights that the model has now; does nothing where the engine runs the model itself."""


def sampling_of(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    thinking: bool,
    temperature: float = 0.0,
    thoughts: int = 0,
) -> Sampling:
    """How an evaluation samples: by temperature alone, whatever the model's own generation config asks for.

    So the engines agree, none of which knows all that such a file can ask for.

    Args:
        model, tokenizer: their end tokens end a completion.
        max_new_tokens: the most tokens of a completion, forced thoughts included.
        thinking: whether the model thinks.
        temperature: over the whole vocabulary; 0 is greedy.
        thoughts: forced thoughts at the start of each completion.
    """
    own = causal_lm(model).generation_config  # has the filler of a model that was trained with forced thoughts
    # `top_k=0` and `top_p=1`: transformers' defaults and the model's own file would narrow the distribution.
    way: dict[str, Any] = {"do_sample": False}
    if temperature:
        way = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    return Sampling(
        bos_token_id=own.bos_token_id,
        eos_token_id=ends_of(model, tokenizer) or None,  # none: its length alone ends a completion
        pad_token_id=tokenizer.pad_token_id,
        filler_token_id=own.filler_token_id,
        max_new_tokens=max_new_tokens,
        thinking=thinking,
        thoughts=thoughts,
        **way,
    )
