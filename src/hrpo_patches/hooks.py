"""Every name that the diffs import, and nothing else: no move inside the package touches a diff.

Each is loaded from its home when an upstream module first asks for it, so that importing this costs nothing.
"""

from __future__ import annotations

from importlib import import_module

_HOMES = {
    "LOOSE_KEYWORDS": "hrpo_thinking.inputs",
    "ThinkingGenerationMixin": "hrpo_patches.thinking.generation",
    "ThinkingInputs": "hrpo_thinking.inputs",
    "ThinkingMixin": "hrpo_patches.thinking.mixin",
    "check_modules_to_save": "hrpo_patches.thinking.mixin",
    "causal_lm_output": "hrpo_patches.thinking.outputs",
    "check_request": "hrpo_patches.thinking.decoding",
    "check_thinking_adapter": "hrpo_patches.models.record",
    "decoder_only_output": "hrpo_patches.thinking.decoding",
    "guard_saving": "hrpo_patches.models.unsloth_saving",
    "is_thinking_module": "hrpo_patches.models.unsloth_forward",
    "is_thinking_parameter": "hrpo_thinking.parts",
    "keep_thinking_options": "hrpo_thinking.config",
    "plain_model_type": "hrpo_thinking.config",
    "refuse_thinking": "hrpo_patches.thinking.decoding",
    "refuse_thinking_adapter": "hrpo_patches.models.record",
    "start_thinking": "hrpo_patches.thinking.decoding",
    "take_thinking": "hrpo_patches.models.unsloth_forward",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'hrpo_patches.hooks' has no attribute {name!r}; it has {sorted(_HOMES)}")
    return getattr(import_module(_HOMES[name]), name)
