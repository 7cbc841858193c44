"""Thinking in vLLM: a plug-in that every process of an engine loads; a model that does not think never meets it.

Imports nothing of hrpo_patches, which must come before transformers, and an engine's processes cannot promise that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hrpo_thinking.config import NEEDS_US
from hrpo_thinking.errors import InputError
from hrpo_thinking.families import FAMILIES, check_vllm
from hrpo_vllm.names import architecture

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig
    from vllm import LLM


def engine_options(config: PreTrainedConfig, thinking: dict[str, Any] | None = None) -> dict[str, Any]:
    """Keyword arguments for `vllm.LLM` on a folder whose own files do not say that it thinks.

    Args:
        config: the model's; its `architectures`, and its `thinking` unless that is given.
        thinking: the record (`hrpo_thinking.config.record_of`) of the weights that the engine holds or will be sent.

    Raises:
        InputError: thinking is not supported in vLLM for the model's family.
    """
    check_vllm(config.model_type)
    record = thinking if thinking is not None else config.thinking
    assert config.architectures  # check_vllm has found the family
    return {"hf_overrides": {"architectures": [architecture(config.architectures[0])], "thinking": record}}


def take_thoughts(llm: LLM, keys: list[str]) -> dict[str, Tensor]:
    """What completions were sampled from, by the `thinking_key` of their requests; each is handed out once.

    Args:
        llm: vLLM's `LLM`, with its engine in this process or in another one.
        keys: of requests that have ended. Of several with one key, the first that ended comes first.

    Returns:
        For each key the states (C, d), on the CPU and in the engine's dtype, of the completion's tokens; there may be
        one more than tokens.

    Raises:
        InputError: a request with one of the keys still runs, or nothing is kept under it; nothing was taken then.
    """
    import torch

    running = list(llm.llm_engine.output_processor.request_states)
    packed = llm.collective_rpc("take_thoughts", args=(keys, running))[0]
    if isinstance(packed, str):
        raise InputError(packed)
    return {
        key: torch.frombuffer(bytearray(values), dtype=getattr(torch, dtype)).reshape(*shape)
        for key, (values, dtype, shape) in packed.items()
    }


def weights_arrived(llm: LLM) -> None:
    """Let the requests of an engine think whose folder lacks thinking weights, once these have been sent to it.

    Args:
        llm: vLLM's `LLM`.

    Raises:
        InputError: some have not arrived.
    """
    llm.collective_rpc("check_thinking")
    config = llm.llm_engine.model_config.hf_config
    config.thinking = config.thinking | {"in_checkpoint": True}


def register() -> None:
    """The entry point `vllm.general_plugins`: names the families that think, under names of their own."""
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from hrpo_vllm import engine

    for kind, family in FAMILIES.items():
        AutoConfig.register(kind + NEEDS_US, engine.CONFIGS[kind], exist_ok=True)  # refuses where vLLM cannot think
        name = architecture(family.causal_lm)
        if family.vllm is not None and name not in MODELS_CONFIG_MAP:
            ModelRegistry.register_model(name, f"hrpo_vllm.models:{name}")
            MODELS_CONFIG_MAP[name] = engine.ThinkingEngine
