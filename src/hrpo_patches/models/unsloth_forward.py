"""What the patched `unsloth/models/llama.py` calls: reads thinking out of its keywords."""

from __future__ import annotations

from typing import Any

from torch import nn

from hrpo_patches.models.backends import NO_BPTT
from hrpo_thinking.errors import InputError
from hrpo_thinking.families import NAMES
from hrpo_thinking.inputs import LOOSE, LOOSE_KEYWORDS, ThinkingInputs
from hrpo_thinking.parts import MODULES


def take_thinking(backbone: nn.Module, kwargs: dict[str, Any], length: int) -> ThinkingInputs | None:
    """The `ThinkingInputs` of this forward, taken out of `kwargs`; None when thinking was not asked for.

    Args:
        backbone: the model that will blend.
        kwargs: unsloth hands what is left of it to every decoder layer.
        length: L, the number of input positions.

    Raises:
        InputError: the family has no patches, a gradient through the thoughts is asked for, or unsloth would cut the
            input, and the states would be out of place.
    """
    thinking: ThinkingInputs | None = kwargs.pop("thinking_inputs", None)
    if not LOOSE_KEYWORDS.isdisjoint(kwargs):
        raise InputError(LOOSE)
    if thinking is None:
        return None
    longest, problem = getattr(backbone, "max_seq_length", length), None
    if thinking.bptt is not None or thinking.states is None:
        problem = NO_BPTT
    elif not hasattr(backbone, "blend_thinking"):
        problem = f"{type(backbone).__name__} cannot think: hrpo_patches has patches for {NAMES} only."
    elif length > longest:
        problem = (
            f"the input has {length} positions, but the model was loaded with max_seq_length={longest}; load it with "
            f"FastLanguageModel.from_pretrained(..., max_seq_length={length})."
        )
    if problem is not None:
        raise InputError(problem)
    return thinking


def is_thinking_module(name: object, model: nn.Module | None = None) -> bool:
    """Whether an entry of `modules_to_save` names one of the four thinking modules, and one that `model` has."""
    if not isinstance(name, str) or name.rpartition(".")[2] not in MODULES:
        return False
    return model is None or any(f".{path}".endswith(f".{name}") for path, _ in model.named_modules())
