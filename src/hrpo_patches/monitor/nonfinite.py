"""Stops a run before a step that is not finite, and keeps what it was computed from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hrpo_patches.thinking.shards import plain
from hrpo_thinking.errors import NonFiniteError


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
    if gradients and not plain(nn.utils.get_total_norm(gradients)).isfinite():
        kept = keep(model, inputs, folder, step, rank)
        raise NonFiniteError(
            f"the gradient of step {step} is not finite, so the step was not taken and no checkpoint was touched; "
            f"what it was computed from is in {kept}. Lower the learning rates or max_grad_norm, and resume from the "
            f"last checkpoint."
        )


def refuse_spoilt(model: nn.Module, inputs: dict[str, Any], folder: Path, step: int, rank: int = 0) -> None:
    """Raise unless the trained weights of `model` are finite; called after the optimizer's step, before any save.

    Args and errors are those of `refuse_nonfinite`.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = [getattr(parameter, "ds_tensor", parameter).detach() for parameter in trained]  # ZeRO-3's own shards
    if weights and not plain(nn.utils.get_total_norm(weights)).isfinite():
        kept = keep(model, inputs, folder, step, rank)
        raise NonFiniteError(
            f"step {step} left weights that are not finite; they were not saved, and no checkpoint was touched; what "
            f"the step was computed from is in {kept}. Lower the learning rates, and resume from the last checkpoint."
        )


def keep(model: nn.Module, inputs: dict[str, Any], folder: Path, step: int, rank: int = 0) -> Path:
    """Write the tensors among `inputs`, and what is not finite, into a new folder; returns it."""
    kept = _unused(folder / f"nonfinite-step-{step}", rank)
    thinking = inputs.get("thinking_inputs")
    states = {"thinking_states": thinking.states, "thinking_mask": thinking.mask} if thinking is not None else {}
    tensors = {name: value for name, value in (inputs | states).items() if isinstance(value, Tensor)}
    save_file(
        {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()},
        kept / "inputs.safetensors",
    )
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    spoilt = [name for name, p in named if p.grad is not None and not plain(p.grad).isfinite().all()]
    record = {
        "step": step,
        "weights": [name for name, parameter in named if not plain(parameter).isfinite().all()],
        "gradients": spoilt
        if len(spoilt) < len(named)
        else "all: clipping spreads one that is not finite to the others",
        "inputs": [name for name, value in tensors.items() if not torch.isfinite(value).all()],
    }
    (kept / "nonfinite.json").write_text(json.dumps(record, indent=2) + "\n")
    return kept


def _unused(folder: Path, rank: int) -> Path:
    """A new folder; a run that was resumed may have come to the same step before."""
    names = [folder.name if not rank else f"{folder.name}-rank-{rank}"]
    while (folder.parent / names[-1]).exists():
        names.append(f"{names[0]}-{len(names) + 1}")
    (folder.parent / names[-1]).mkdir(parents=True)
    return folder.parent / names[-1]
