"""Every name that the diffs import, and nothing else: no move inside the package touches a diff.

Each is loaded from its home when an upstream module first asks for it, so that importing this costs nothing.
"""

from __future__ import annotations

from importlib import import_module

_HOMES = {
    "ThinkingMixin": "thinking",
    "check_modules_to_save": "thinking",
    "check_request": "decoding",
    "guard_saving": "unsloth_save",
    "is_thinking_module": "unsloth_hooks",
    "is_thinking_parameter": "thinking",
    "plain_model_type": "config",
    "refuse_thinking": "decoding",
    "start_thinking": "decoding",
    "take_thinking": "unsloth_hooks",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'hrpo_patches.hooks' has no attribute {name!r}; it has {sorted(_HOMES)}")
    return getattr(import_module(f"hrpo_patches.{_HOMES[name]}"), name)
