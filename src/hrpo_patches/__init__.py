"""Hybrid latent reasoning for transformers: importing this package installs the patches.

`import hrpo_patches` must come before transformers (and unsloth). It imports neither of them, nor torch: the public
names below are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module

from hrpo_patches.patching import overlay

TYPE_CHECKING = False  # as typing's, without the cost of importing typing
__version__ = "0.3.0"

_HOMES = {
    "HRPOConfig": "hrpo_patches.training.config",
    "HRPOSFTConfig": "hrpo_patches.training.sft_config",
    "HRPOSFTTrainer": "hrpo_patches.training.sft",
    "HRPOTrainer": "hrpo_patches.training.trainer",
    "InputError": "hrpo_thinking.errors",
    "NonFiniteError": "hrpo_thinking.errors",
    "PatchError": "hrpo_thinking.errors",
    "ThinkingConfig": "hrpo_thinking.config",
    "load_adapter": "hrpo_patches.models.adapter",
    "monitor_thinking": "hrpo_patches.monitor.callback",
    "patch_trainer_optimizer": "hrpo_patches.training.optim",
    "replay_forward": "hrpo_patches.thinking.replay",
    "thinking_roll": "hrpo_patches.thinking.replay",
}

__all__ = sorted(_HOMES)

if TYPE_CHECKING:
    from hrpo_patches.models.adapter import load_adapter as load_adapter
    from hrpo_patches.monitor.callback import monitor_thinking as monitor_thinking
    from hrpo_patches.thinking.replay import replay_forward as replay_forward
    from hrpo_patches.thinking.replay import thinking_roll as thinking_roll
    from hrpo_patches.training.config import HRPOConfig as HRPOConfig
    from hrpo_patches.training.optim import patch_trainer_optimizer as patch_trainer_optimizer
    from hrpo_patches.training.sft import HRPOSFTTrainer as HRPOSFTTrainer
    from hrpo_patches.training.sft_config import HRPOSFTConfig as HRPOSFTConfig
    from hrpo_patches.training.trainer import HRPOTrainer as HRPOTrainer
    from hrpo_thinking.config import ThinkingConfig as ThinkingConfig
    from hrpo_thinking.errors import InputError as InputError
    from hrpo_thinking.errors import NonFiniteError as NonFiniteError
    from hrpo_thinking.errors import PatchError as PatchError


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'hrpo_patches' has no attribute {name!r}; its public names are {__all__}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


overlay.install()
