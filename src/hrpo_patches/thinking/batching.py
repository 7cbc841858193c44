"""What transformers' continuous batching is asked for: its config, its cache, and what cannot think in it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from hrpo_patches.thinking.backbone import thinking_backbone
from hrpo_patches.thinking.decoding import NEUTRAL, check_request
from hrpo_thinking.errors import InputError
from hrpo_thinking.request import check_residual, check_room

if TYPE_CHECKING:
    from transformers import ContinuousBatchingConfig, PreTrainedTokenizerBase

    from hrpo_patches.thinking.backbone import Model
    from hrpo_patches.thinking.decoding import Sampling

PAGE = 32  # tokens in a block of the cache
MEMORY = 4 << 30  # bytes of keys and values
# What this engine ignores, or reads in the wrong text, because it hands over no more than the last tokens.
_NOT_READ = (
    *("repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
    *("min_length", "min_new_tokens", "stop_strings", "max_time", "guidance_scale", "watermarking_config"),
    *("bad_words_ids", "sequence_bias", "begin_suppress_tokens", "exponential_decay_length_penalty"),
    *("forced_bos_token_id", "forced_eos_token_id"),
)


def batching_config(
    given: ContinuousBatchingConfig | None, model: Model, hints: Any = None
) -> ContinuousBatchingConfig:
    """A copy of the engine's config with what cannot think switched off: a step must wait for the one before.

    A cache that nobody sized is made for the requests that `hints` (the engine's WorkloadHints) announce.

    Raises:
        InputError: what cannot think was asked for.
    """
    from transformers import ContinuousBatchingConfig

    # A copy: the user's own is left as it was.
    config = copy.copy(given) if given is not None else ContinuousBatchingConfig()
    for name in ("use_async_batching", "use_cuda_graph"):
        if getattr(config, name):
            raise InputError(f"continuous batching with {name}={getattr(config, name)!r} cannot think; remove it.")
        setattr(config, name, False)
    for name in ("varlen_compile_config", "decode_compile_config"):
        if getattr(config, name, None) is not None:
            raise InputError(f"continuous batching that is compiled ({name}) cannot think; remove it.")
    keep_attention(config, model)
    if hints is not None and config.num_blocks is None:
        longest = hints.max_prompt_length + (hints.max_generated_length or 0)
        for name, value in cache_size(model, longest, hints.num_requests).items():
            setattr(config, name, value)
    return config


def keep_attention(config: ContinuousBatchingConfig, model: Model) -> None:
    """Keep the engine from switching a float32 model to flash attention, which has no float32 kernels."""
    if model.dtype.itemsize > 2 and hasattr(config, "auto_switch_to_flash"):
        config.auto_switch_to_flash = False


def cache_size(model: Model, longest: int, requests: int, device: torch.device | None = None) -> dict[str, Any]:
    """Options of the engine's config that make its cache fit so many requests of so many tokens; none on a GPU.

    By default the engine takes half of a CPU's memory, and fills masks of that size. `device` is where the model will
    be, by default where it is.
    """
    from transformers import ContinuousBatchingConfig

    if (device if device is not None else model.device).type != "cpu":
        return {}
    own = model.config.get_text_config()
    # Bytes of a page: keys and values of all layers.
    heads = getattr(own, "num_key_value_heads", None) or own.num_attention_heads
    width = getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads
    page = 2 * own.num_hidden_layers * heads * width * PAGE * model.dtype.itemsize
    one = -(-longest // PAGE) + 1  # pages of a request
    name = "page_size" if hasattr(ContinuousBatchingConfig(), "page_size") else "block_size"
    blocks = max(one, min(one * requests, MEMORY // page))
    return {name: PAGE, "num_blocks": blocks, "max_batch_tokens": max(1024, requests)}


def check(model: Model, tokenizer: PreTrainedTokenizerBase | None, generation_config: Sampling) -> None:
    """Before there is a manager, which changes the model's attention: can it think as `generation_config` asks?

    Raises:
        InputError: as `decoding.check_request`, or the residual or the sampling is none of this engine's.
    """
    check_request(model, generation_config, generation_config.get_generation_mode(), tokenizer)
    check_residual(thinking_backbone(model).config.thinking["residual"], "continuous batching")
    forced = generation_config.thoughts or 0
    if generation_config.max_new_tokens is not None:
        check_room(forced, generation_config.max_new_tokens)
    for name in (*_NOT_READ, "suppress_tokens") if forced else _NOT_READ:
        value = getattr(generation_config, name, None)
        if value not in (None, [], {}, *NEUTRAL.get(name, ())):
            also = " with forced thoughts" if name == "suppress_tokens" else ""
            raise InputError(
                f"{name}={value!r} cannot be followed by continuous batching that thinks{also}; remove it, or call "
                f"generate."
            )
