"""Makes thinking rollouts with either engine, in one shape; knows generation and tensors, no trainers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl.trainer.utils import pad

from hrpo_patches.thinking.replay import Rollout


@dataclass
class Made:
    """A rollout, and the completions that it belongs to.

    Attributes:
        rollout: states and mask of every completion token, forced thoughts included.
        ratio: (B, C), the share of the embedding, as `generate` returns it.
        completions: the token ids of each, without forced thoughts, up to its end token.
    """

    rollout: Rollout
    ratio: Tensor
    completions: list[list[int]]


def by_generate(
    model: Any, tokenizer: Any, prompts: list[list[int]], generation_config: Any, ends: list[int], forced: int
) -> Made:
    """A rollout by `model.generate`, of all prompts in one padded batch.

    Args:
        model, tokenizer: that think.
        prompts: token ids.
        generation_config: with `thinking=True` and `return_dict_in_generate=True`.
        ends: the tokens that end a completion.
        forced: how many forced thoughts a completion begins with.
    """
    rows = [torch.tensor(ids) for ids in prompts]
    ids = pad(rows, padding_value=tokenizer.pad_token_id, padding_side="left").to(model.device)
    seen = pad([torch.ones_like(row) for row in rows], padding_value=0, padding_side="left").to(model.device)
    out = model.generate(input_ids=ids, attention_mask=seen, generation_config=generation_config, tokenizer=tokenizer)
    tokens = out.sequences[:, ids.shape[1] + forced :]
    is_end = torch.isin(tokens, torch.tensor(ends, device=tokens.device))
    kept = is_end.cumsum(dim=1) - is_end.long() == 0  # up to and including the first end token
    completions = [row[keep].tolist() for row, keep in zip(tokens.cpu(), kept.cpu(), strict=True)]
    rollout = Rollout(out.thinking_states, out.thinking_mask, out.thinking_residual)
    return Made(rollout, out.thinking_ratio, completions)


def by_batches(
    model: Any, tokenizer: Any, prompts: list[list[int]], generation_config: Any, config: Any, forced: int
) -> Made:
    """A rollout by transformers' continuous batching; `config` is the engine's, the rest as for `by_generate`.

    Raises:
        RuntimeError: the engine failed at a request; the message is its own.
    """
    outputs = model.generate_batch(prompts, generation_config, config, tokenizer=tokenizer)
    failed = [output.error for output in outputs.values() if output.error]
    if failed or len(outputs) != len(prompts):
        raise RuntimeError(f"continuous batching failed: {failed[0] if failed else 'requests are missing'}")
    ready = list(outputs.values())
    states = pad_sequence([output.thinking_states for output in ready], batch_first=True)
    mask = pad_sequence([output.thinking_mask for output in ready], batch_first=True)
    ratio = pad_sequence([output.thinking_ratio for output in ready], batch_first=True, padding_value=1.0)
    rollout = Rollout(states, mask, ready[0].thinking_residual)
    return Made(rollout, ratio, [output.generated_tokens[forced:] for output in ready])
