"""Every name that the diffs import, and nothing else: no move inside the package touches a diff.

Each is loaded from its home when an upstream module first asks for it, so that importing this costs nothing.
"""

from __future__ import annotations

from importlib import import_module

_HOMES = {
    "ThinkingMixin": "hrpo_patches.thinking",
    "check_modules_to_save": "hrpo_patches.thinking",
    "check_request": "hrpo_patches.decoding",
    "guard_saving": "hrpo_patches.unsloth_save",
    "is_thinking_module": "hrpo_patches.unsloth_hooks",
    "is_thinking_parameter": "hrpo_thinking.parts",
    "plain_model_type": "hrpo_thinking.config",
    "refuse_thinking": "hrpo_patches.decoding",
    "start_thinking": "hrpo_patches.decoding",
    "take_thinking": "hrpo_patches.unsloth_hooks",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'hrpo_patches.hooks' has no attribute {name!r}; it has {sorted(_HOMES)}")
    return getattr(import_module(_HOMES[name]), name)
