"""`generate`: all prompts in one padded batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import pad

from hrpo_patches.engines.base import Completions, Sampling, check_prompts
from hrpo_patches.thinking.backbone import causal_lm, temporarily
from hrpo_patches.thinking.decoding import end_ids
from hrpo_thinking.inputs import ThinkingInputs

if TYPE_CHECKING:
    from hrpo_patches.thinking.backbone import Model


class GenerateEngine:
    """`Engine` by transformers' `generate`, with the model's own weights.

    Args:
        model: a causal language model, also a PEFT one.
        tokenizer: with a padding token; spells the answer marker.
    """

    def __init__(self, model: Model, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer

    def refresh_weights(self) -> None:
        """Nothing to do: it runs the model itself."""

    def complete(self, prompts: list[list[int]], sampling: Sampling) -> Completions:
        """As `Engine.complete`."""
        check_prompts(prompts)
        device, padding = self.model.device, self.tokenizer.pad_token_id
        rows = [torch.tensor(ids) for ids in prompts]
        # On the left: the first thought is made from the state at the last column, which must be a token's.
        ids = pad(rows, padding_value=padding, padding_side="left").to(device)  # (B, P)
        seen = pad([torch.ones_like(row) for row in rows], padding_value=0, padding_side="left").to(device)
        forced = sampling.thoughts or 0
        words = {"tokenizer": self.tokenizer} if sampling.thinking or forced else {}
        generate: Any = self.model.generate
        # Not passed as an argument: `generate` would complete that from the model's own config (min_p, stop strings).
        with temporarily(causal_lm(self.model), generation_config=sampling):
            out = generate(input_ids=ids, attention_mask=seen, **words)
        own = slice(ids.shape[1] + forced, None)  # without the prompt and the forced thoughts
        if not (sampling.thinking and sampling.return_dict_in_generate):
            # Without a record the mask of what was sampled is missing; the end tokens tell.
            tokens = out.sequences if sampling.return_dict_in_generate else out
            return Completions([_up_to_end(row, end_ids(sampling)) for row in tokens[:, own].tolist()])
        tokens, kept = out.sequences[:, own].cpu(), out.attention_mask[:, own].cpu().bool()
        # The states keep the forced thoughts: they are columns of the replay, though no text.
        completions = [row[keep].tolist() for row, keep in zip(tokens, kept, strict=True)]
        thinking = ThinkingInputs(out.thinking_states, out.thinking_mask, out.thinking_residual)
        return Completions(completions, thinking=thinking, ratio=out.thinking_ratio)


def _up_to_end(row: list[int], ends: list[int]) -> list[int]:
    """A completion without the padding behind its end token, which is kept."""
    return next((row[: i + 1] for i, token in enumerate(row) if token in ends), row)
