"""Stops a run before a step that is not finite, and keeps what it was computed from; knows tensors and a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hrpo_patches.errors import NonFiniteError


def refuse_nonfinite(model: nn.Module, inputs: dict[str, Any], folder: Path, step: int, rank: int = 0) -> None:
    """Raise unless the gradients of `model` are finite; called before the optimizer's step, so no weight is spoilt.

    Args:
        model: whose gradients are looked at.
        inputs: keyword arguments of the last forward; its tensors are kept in `folder/nonfinite-step-N/`.
        folder: the run's.
        step: the number of the step that is not taken.
        rank: of this process.

    Raises:
        NonFiniteError: the norm of the gradients is NaN or infinite.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if not gradients or bool(nn.utils.get_total_norm(gradients).isfinite()):
        return
    kept = _unused(folder / f"nonfinite-step-{step}", rank)
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    save_file(
        {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()},
        kept / "inputs.safetensors",
    )
    named = list(model.named_parameters())
    record = {
        "step": step,
        "weights": [name for name, parameter in named if not parameter.isfinite().all()],
        "gradients": [name for name, p in named if p.grad is not None and not p.grad.isfinite().all()],
        "inputs": [name for name, value in tensors.items() if not torch.isfinite(value).all()],
    }
    (kept / "nonfinite.json").write_text(json.dumps(record, indent=2) + "\n")
    raise NonFiniteError(
        f"the gradient of step {step} is not finite, so the step was not taken and no checkpoint was touched; what it "
        f"was computed from is in {kept}. Lower the learning rates or max_grad_norm, and resume from the last "
        f"checkpoint."
    )


def _unused(folder: Path, rank: int) -> Path:
    """A new folder; a run that was resumed may have come to the same step before."""
    names = [folder.name if not rank else f"{folder.name}-rank-{rank}"]
    while (folder.parent / names[-1]).exists():
        names.append(f"{names[0]}-{len(names) + 1}")
    (folder.parent / names[-1]).mkdir(parents=True)
    return folder.parent / names[-1]
