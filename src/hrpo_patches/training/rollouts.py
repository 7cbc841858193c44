"""Makes thinking rollouts with each engine, in one shape."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl.trainer.utils import pad

from hrpo_patches.thinking.backbone import ratio_of, temporarily
from hrpo_patches.thinking.decoding import by_temperature
from hrpo_thinking.config import ThinkingConfig
from hrpo_thinking.inputs import ThinkingInputs
from hrpo_thinking.marker import thinking_table
from hrpo_thinking.request import ThinkingRequest


@dataclass
class Made:
    """A rollout, and the completions that it belongs to.

    Attributes:
        thinking: of every completion token, forced thoughts included.
        ratio: (B, C), the share of the embedding, as `generate` returns it.
        completions: the token ids of each, without forced thoughts, up to its end token.
        logprobs: of these tokens, as the engine sampled them; None where it does not say.
    """

    thinking: ThinkingInputs
    ratio: Tensor
    completions: list[list[int]]
    logprobs: list[list[float]] | None = None

    def shares(self) -> Tensor:
        """Over the positions that think: the sums of a and of sqrt(1 - a²), and how many there are; (3,)."""
        mask = self.thinking.mask
        a = torch.where(mask, self.ratio, 0.0)
        hidden = torch.where(mask, torch.sqrt(1 - a.square()), 0.0)
        return torch.stack([a.sum(), hidden.sum(), mask.sum().float()])


def by_generate(model: Any, tokenizer: Any, prompts: list[list[int]], generation_config: Any, forced: int) -> Made:
    """A rollout by `model.generate`, of all prompts in one padded batch.

    Args:
        model, tokenizer: that think.
        prompts: token ids.
        generation_config: with `thinking=True` and `return_dict_in_generate=True`.
        forced: how many forced thoughts a completion begins with.
    """
    rows = [torch.tensor(ids) for ids in prompts]
    ids = pad(rows, padding_value=tokenizer.pad_token_id, padding_side="left").to(model.device)
    seen = pad([torch.ones_like(row) for row in rows], padding_value=0, padding_side="left").to(model.device)
    asked = {"generation_config": generation_config, "tokenizer": tokenizer}
    with by_temperature(model):
        out = model.generate(input_ids=ids, attention_mask=seen, **asked)
    own = slice(ids.shape[1] + forced, None)
    tokens, kept = out.sequences[:, own].cpu(), out.attention_mask[:, own].cpu().bool()
    completions = [row[keep].tolist() for row, keep in zip(tokens, kept, strict=True)]
    thinking = ThinkingInputs(out.thinking_states, out.thinking_mask, out.thinking_residual)
    return Made(thinking, out.thinking_ratio, completions)


def by_batches(
    model: Any, tokenizer: Any, prompts: list[list[int]], generation_config: Any, config: Any, forced: int
) -> Made:
    """A rollout by transformers' continuous batching; `config` is the engine's, the rest as for `by_generate`.

    Raises:
        RuntimeError: the engine failed at a request; the message is its own.
    """
    with by_temperature(model):
        outputs = model.generate_batch(prompts, generation_config, config, tokenizer=tokenizer)
    failed = [output.error for output in outputs.values() if output.error]
    if failed or len(outputs) != len(prompts):
        raise RuntimeError(f"continuous batching failed: {failed[0] if failed else 'requests are missing'}")
    ready = list(outputs.values())
    states = pad_sequence([output.thinking_states for output in ready], batch_first=True)
    mask = pad_sequence([output.thinking_mask for output in ready], batch_first=True)
    ratio = pad_sequence([output.thinking_ratio for output in ready], batch_first=True, padding_value=1.0)
    thinking = ThinkingInputs(states, mask, ready[0].thinking_residual)
    return Made(thinking, ratio, [output.generated_tokens[forced:] for output in ready])


def by_vllm(
    backbone: Any, tokenizer: Any, tokens: list[list[int]], logprobs: Any, states: list[Tensor], forced: int
) -> Made:
    """A rollout from what a vLLM engine said and thought.

    Args:
        backbone, tokenizer: of the model.
        tokens: of each completion, forced thoughts included.
        logprobs: of these tokens.
        states: (C, d), what each was sampled from.
        forced: how many forced thoughts a completion begins with.

    Raises:
        RuntimeError: a log-probability is not a number.
    """
    if any(one is None or math.isnan(one) for row in logprobs for one in row):
        raise RuntimeError("a probability tensor of vLLM's holds no numbers")
    thinking = ThinkingConfig.from_dict(backbone.config.thinking)
    table = thinking_table(tokenizer, thinking, backbone.config.vocab_size).numpy()
    masks, ratios = [], []
    for row in tokens:
        record = ThinkingRequest(table, forced)
        masks.append(torch.tensor([record.read(i, token) for i, token in enumerate(row)]))
        ratios.append(ratio_of(backbone, row, masks[-1]))
    device = ratios[0].device
    padded = pad_sequence(states, batch_first=True).to(device), pad_sequence(masks, batch_first=True).to(device)
    return Made(
        ThinkingInputs(*padded, thinking.residual),
        pad_sequence(ratios, batch_first=True, padding_value=1.0),
        [row[forced:] for row in tokens],
        [row[forced:] for row in logprobs],
    )


def engines_that_think(module: Any) -> AbstractContextManager[None]:
    """Within, a trainer of TRL's `module` makes the vLLM engine that thinks, and that runs on a CPU, too."""
    from hrpo_patches.models.vllm_engine import ThinkingVLLM

    return temporarily(module, VLLMGeneration=ThinkingVLLM)
