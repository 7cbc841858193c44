"""transformers' continuous batching: requests of all lengths packed into one forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.nn.utils.rnn import pad_sequence
from transformers import ContinuousBatchingConfig, PreTrainedTokenizerBase

from hrpo_patches.engines.base import Completions, Sampling, check_prompts
from hrpo_patches.thinking.backbone import causal_lm, temporarily
from hrpo_patches.thinking.batching import cache_size, keep_attention
from hrpo_thinking.inputs import ThinkingInputs

if TYPE_CHECKING:
    from hrpo_patches.thinking.backbone import Model


class ContinuousEngine:
    """`Engine` by `generate_batch`, with the model's own weights.

    Args:
        model: a causal language model, also a PEFT one.
        tokenizer: spells the answer marker.
        config: of the batching; by default its cache fits the prompts at hand.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerBase,
        config: ContinuousBatchingConfig | None = None,
    ) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config

    def refresh_weights(self) -> None:
        """Nothing to do: it runs the model itself."""

    def complete(self, prompts: list[list[int]], sampling: Sampling) -> Completions:
        """As `Engine.complete`."""
        check_prompts(prompts)
        config, forced = self.config, sampling.thoughts or 0
        if config is None:  # upstream's default takes half of a CPU's memory
            longest = max(map(len, prompts)) + (sampling.max_new_tokens or 0)
            config = ContinuousBatchingConfig(**cache_size(self.model, longest, len(prompts)))
            keep_attention(config, self.model)
        generate_batch: Any = self.model.generate_batch
        with temporarily(causal_lm(self.model), generation_config=sampling):
            outputs = generate_batch(prompts, sampling, config, tokenizer=self.tokenizer)
        ready = list(outputs.values())  # in the order of the prompts
        failed = [output.error for output in ready if output.error]
        if failed or len(ready) != len(prompts):
            raise RuntimeError(f"continuous batching failed: {failed[0] if failed else 'requests are missing'}")
        tokens = [output.generated_tokens[forced:] for output in ready]
        if not (sampling.thinking and sampling.return_dict_in_generate):
            return Completions(tokens)
        # Each (C of its own, d); padded on the right, as the mask says.
        states = pad_sequence([output.thinking_states for output in ready], batch_first=True)
        mask = pad_sequence([output.thinking_mask for output in ready], batch_first=True)
        ratio = pad_sequence([output.thinking_ratio for output in ready], batch_first=True, padding_value=1.0)
        return Completions(tokens, thinking=ThinkingInputs(states, mask, ready[0].thinking_residual), ratio=ratio)
