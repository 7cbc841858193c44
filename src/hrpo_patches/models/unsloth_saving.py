"""What the patched `unsloth/save.py` calls: no way of saving loses trained thinking weights.

The adapter and the merged 16-bit model are saved with them; what unsloth writes for other programs (GGUF, torchao,
OpenVINO, compressed or 4-bit models, uploads of a merge) cannot hold them and is refused before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hrpo_patches.models.checkpoint import add_thinking
from hrpo_patches.models.record import save_thinking
from hrpo_patches.thinking.backbone import causal_lm
from hrpo_thinking.errors import InputError
from hrpo_thinking.modules import ThinkingModule
from hrpo_thinking.parts import MODULES, is_thinking_parameter

_REFUSED = (
    "push_to_hub_merged",
    "save_pretrained_gguf",
    "push_to_hub_gguf",
    "save_pretrained_torchao",
    "save_pretrained_openvino",
    "push_to_hub_openvino",
    "save_pretrained_ggml",
    "push_to_hub_ggml",
)
_ORIGINAL = "_unsloth_original_"  # prefix of the name of a method that a guard replaced
_GUARD = "keeps_thinking"  # attribute of a guard
_MERGE_OPTIONS = {
    "dtype",
    "max_shard_size",
    "maximum_memory_usage",
    "tags",
    "safe_serialization",
    "temporary_location",
    "token",
}


def trained_thinking(model: nn.Module) -> dict[str, Tensor]:
    """The thinking weights that a save must keep, by the base model's names; none where all are as they were drawn.

    Raises:
        InputError: several adapters are active, or none, so that it is not clear whose weights they are.
    """
    base = causal_lm(model)
    weights: dict[str, Tensor] = {}
    trained = False
    for name, module in base.named_modules():
        if name.rpartition(".")[2] not in MODULES:
            continue
        if hasattr(module, "modules_to_save"):
            active = module.active_adapters
            if len(active) != 1 or active[0] not in module.modules_to_save:
                raise InputError(f"{name} has the active adapters {active}; one must be set to be saved or merged.")
            module, trained = module.modules_to_save[active[0]], True
        trained |= not all(part.is_fresh() for part in module.modules() if isinstance(part, ThinkingModule))
        weights |= {f"{name}.{parameter}": value for parameter, value in module.named_parameters()}
    return weights if trained else {}


def guard_saving(model: object) -> None:
    """Called by unsloth whenever it has given `model` (also a PEFT model, also a tokenizer) its saving methods."""
    if not isinstance(model, nn.Module):
        return
    if not any(is_thinking_parameter(name) for name, _ in model.named_parameters()):
        return
    guards = {name: _refusing(name) for name in _REFUSED}
    guards |= {"save_pretrained_merged": save_pretrained_merged, "save_pretrained": unsloth_model_save_pretrained}
    for name, guard in guards.items():
        method = getattr(model, name, None)
        if method is None or hasattr(method, _GUARD):
            continue
        # Kept on the model, where a deep copy finds its own; a closure would save the model that was copied.
        setattr(model, _ORIGINAL + name, method)
        setattr(guard, _GUARD, True)
        setattr(model, name, MethodType(guard, model))


def _original(model: nn.Module, name: str) -> Callable[..., Any]:
    """unsloth's method that a guard replaced."""
    method: Callable[..., Any] = getattr(model, _ORIGINAL + name)
    return method


def _refusing(name: str) -> Callable[..., Any]:
    """The guard of a method that cannot keep thinking weights."""

    def refuse(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if trained_thinking(self):
            raise InputError(
                f"{name} cannot keep the thinking weights, so nothing was written. Use save_pretrained for the "
                f"adapter or save_pretrained_merged(folder, tokenizer, save_method='merged_16bit') for a full model."
            )
        return _original(self, name)(*args, **kwargs)

    return refuse


def save_pretrained_merged(
    self: PreTrainedModel,
    save_directory: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    save_method: str = "merged_16bit",
    *args: Any,
    **kwargs: Any,
) -> Any:
    """unsloth's, which merges the adapter; the thinking weights are added to what it wrote.

    Raises:
        InputError: before anything is written, if the options cannot keep the thinking weights.
    """
    weights = trained_thinking(self)
    kind = save_method.lower().replace(" ", "_")
    others = any(args) or {name for name, value in kwargs.items() if value} - _MERGE_OPTIONS
    pickled = kwargs.get("safe_serialization", True) is False
    if weights and (kind not in ("merged_16bit", "lora") or others or pickled):
        raise InputError(
            f"save_pretrained_merged(save_method={save_method!r}) with these options cannot keep the thinking "
            f"weights, so nothing was written. Use save_method='merged_16bit' or 'lora', with no other options "
            f"than {', '.join(sorted(_MERGE_OPTIONS))}."
        )
    result = _original(self, "save_pretrained_merged")(save_directory, tokenizer, save_method, *args, **kwargs)
    if weights and kind == "merged_16bit":
        add_thinking(Path(save_directory), weights, causal_lm(self).config.thinking)
    elif weights:
        save_thinking(self, save_directory)
    return result


# By this name unsloth knows that it has wrapped a `save_pretrained`; it wraps again what has another.
def unsloth_model_save_pretrained(self: PreTrainedModel, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
    """unsloth's, with the thinking record beside an adapter.

    Raises:
        InputError: before anything is written, if the adapter was to be pickled.
    """
    adapted = hasattr(self, "get_base_model") and trained_thinking(self)
    if adapted and (kwargs.get("safe_serialization", True) is False or (args and args[0] is False)):
        raise InputError("a pickled adapter is not read again, so nothing was written; remove safe_serialization.")
    result = _original(self, "save_pretrained")(save_directory, *args, **kwargs)
    if adapted:
        save_thinking(self, save_directory)
    return result
