"""The model families that can think, in one table: all that depends on which there are is derived from its rows.

Nothing is imported here, so that any engine can read it; docs/add-a-model.md says what a new row needs beside itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from hrpo_thinking.errors import InputError


class Family(NamedTuple):
    """A model family that can think in transformers.

    Attributes:
        name: what the names of its classes begin with in transformers ("Llama" of `LlamaForCausalLM`).
        vllm: module, under `vllm.model_executor.models`, and class that run it in vLLM and can be extended to think;
            None where thinking is not supported in vLLM.
        unsloth: whether the diffs of unsloth let its forward there think.
    """

    name: str
    vllm: tuple[str, str] | None = None
    unsloth: bool = False

    @property
    def causal_lm(self) -> str:
        """The name of its causal language model in transformers, which a config's `architectures` holds."""
        return f"{self.name}ForCausalLM"

    @property
    def config(self) -> str:
        """The name of its config class in transformers."""
        return f"{self.name}Config"


FAMILIES = {  # by model type, which is also the name of the family's folder in transformers
    "llama": Family("Llama", vllm=("llama", "LlamaForCausalLM"), unsloth=True),
    "qwen2": Family("Qwen2", vllm=("qwen2", "Qwen2ForCausalLM"), unsloth=True),
    "qwen3": Family("Qwen3", vllm=("qwen3", "Qwen3ForCausalLM"), unsloth=True),
    "mistral": Family("Mistral", vllm=("mistral", "MistralForCausalLM")),
}


def listed(families: Iterable[Family]) -> str:
    """The names of families in a sentence: "Llama, Qwen2 or Qwen3"."""
    return " or ".join(", ".join(family.name for family in families).rsplit(", ", 1))


NAMES = listed(FAMILIES.values())


def check_vllm(model_type: str) -> None:
    """Raise `InputError` for the model type of a family that can think, but not in vLLM."""
    family = FAMILIES.get(model_type)
    if family is not None and family.vllm is None:
        supported = listed(one for one in FAMILIES.values() if one.vllm)
        raise InputError(
            f"thinking {family.name} models are not supported in vLLM, only {supported}; use the engine generate."
        )


def check_unsloth(model_type: str) -> None:
    """Raise `InputError` for the model type of a family that can think, but not in unsloth."""
    family = FAMILIES.get(model_type)
    if family is not None and not family.unsloth:
        supported = listed(one for one in FAMILIES.values() if one.unsloth)
        raise InputError(
            f"thinking {family.name} models are not supported in unsloth, only {supported}; use transformers."
        )
