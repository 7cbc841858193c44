"""The device that a process computes on, and whether it has bfloat16."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def run_device() -> torch.device:
    """The accelerator that is current in this process, or else the CPU; not Apple's, which has no float64."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None or found.type == "mps":
        return torch.device("cpu")
    return torch.device(found.type, torch.accelerator.current_device_index())


def has_bf16() -> bool:
    """Whether there is a GPU that computes in bfloat16; one that emulates it slowly (T4, V100) does not count."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def placed(model: M, device: torch.device | None = None) -> M:
    """A model on a device, by default this process's; one that is quantized, or spread over devices, stays there."""
    spread = getattr(model, "hf_device_map", None) is not None or getattr(model, "is_quantized", False)
    return model if spread else model.to(device or run_device())
