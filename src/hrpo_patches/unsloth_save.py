"""What the patched `unsloth/save.py` calls: no way of saving loses trained thinking weights; knows files and names.

The adapter and the merged 16-bit model are saved with them; what unsloth writes for other programs (GGUF, torchao,
OpenVINO, compressed or 4-bit models, uploads of a merge) cannot hold them and is refused before anything is written.
"""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import Any

from torch import Tensor

from hrpo_patches.checkpoint import save_thinking
from hrpo_patches.config import ThinkingConfig
from hrpo_patches.errors import InputError
from hrpo_patches.full_checkpoint import add_thinking
from hrpo_patches.thinking import canonical, is_thinking_parameter

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
_MERGE_OPTIONS = {"dtype", "max_shard_size", "maximum_memory_usage", "tags", "temporary_location", "token"}


def trained_thinking(model: Any) -> dict[str, Tensor]:
    """The thinking weights that a save has to keep, by the base model's names; none for modules never trained."""
    named = [(name, p) for name, p in model.named_parameters() if is_thinking_parameter(name)]
    adapted = {canonical(name): p for name, p in named if ".modules_to_save." in name}
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    thinking = ThinkingConfig.of(base.config) if hasattr(base.config, "thinking") else None
    if not adapted and not (thinking is not None and thinking.in_checkpoint):
        return {}
    originals = {canonical(name).replace(".original_module", ""): p for name, p in named}
    return originals | adapted


def guard_saving(model: Any) -> None:
    """Called by unsloth whenever it has given `model` (also a PEFT model, also a tokenizer) its saving methods."""
    if not hasattr(model, "named_parameters") or not any(
        is_thinking_parameter(n) for n, _ in model.named_parameters()
    ):
        return
    for name in _REFUSED:
        if hasattr(model, name):
            setattr(model, name, MethodType(_refusing(name, getattr(model, name)), model))
    if hasattr(model, "save_pretrained_merged"):
        model.save_pretrained_merged = MethodType(_merged(model.save_pretrained_merged), model)
    if not hasattr(model.save_pretrained, "keeps_thinking"):
        model.save_pretrained = MethodType(_adapter(model.save_pretrained), model)


def _refusing(name: str, original: Any) -> Any:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        if trained_thinking(self):
            raise InputError(
                f"{name} cannot keep the thinking weights, so nothing was written. Use save_pretrained for the "
                f"adapter or save_pretrained_merged(folder, tokenizer, save_method='merged_16bit') for a full model."
            )
        return original(*args, **kwargs)

    return refuse


def _merged(original: Any) -> Any:
    def save(
        self: Any,
        save_directory: Any,
        tokenizer: Any = None,
        save_method: str = "merged_16bit",
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        weights = trained_thinking(self)
        kind = save_method.lower().replace(" ", "_")
        if weights and (kind not in ("merged_16bit", "lora") or args or set(kwargs) - _MERGE_OPTIONS):
            raise InputError(
                f"save_pretrained_merged(save_method={save_method!r}) with these options cannot keep the thinking "
                f"weights, so nothing was written. Use save_method='merged_16bit' or 'lora', with no other options "
                f"than {', '.join(sorted(_MERGE_OPTIONS))}."
            )
        result = original(save_directory, tokenizer, save_method, *args, **kwargs)
        if weights and kind == "merged_16bit":
            thinking = ThinkingConfig.of(
                self.get_base_model().config if hasattr(self, "get_base_model") else self.config
            )
            assert thinking is not None  # it has thinking weights
            add_thinking(Path(save_directory), weights, thinking.to_dict())
        elif weights:
            save_thinking(self, save_directory)
        return result

    return save


def _adapter(original: Any) -> Any:
    def save(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(save_directory, *args, **kwargs)
        if hasattr(self, "get_base_model") and trained_thinking(self):
            save_thinking(self, save_directory)
        return result

    save.__name__ = original.__name__  # unsloth wraps again whatever has another name than its own wrapper
    save.keeps_thinking = True  # type: ignore[attr-defined]
    return save
