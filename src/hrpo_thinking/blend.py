"""The maths of a thinking position: decay, residual and blend.

Shapes: d is the hidden size, `...` any leading shape. Everything here is computed in float32, the dtype of the
thinking modules, with autocast off, and only the blend is rounded to the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from hrpo_thinking.config import scaled_to_embeddings
from hrpo_thinking.errors import InputError
from hrpo_thinking.inputs import ThinkingInputs
from hrpo_thinking.modules import ThinkingLambda, wide
from hrpo_thinking.parts import RESIDUALS

Control = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # (s, e, mask) -> (s, mask)

EPS = 1e-8


def projection_residual(projected: Tensor) -> Tensor:
    """s = Wh / (‖Wh‖₂ + 1e-8), from `projected` = Wh (..., d)."""
    return projected / (torch.linalg.vector_norm(projected, dim=-1, keepdim=True) + EPS)


class Blend:
    """What a backbone that holds the thinking modules can do with them, in whatever engine it runs.

    It has the modules of `modules.thinking_modules` under their names, `config.thinking` as a dict, and
    `get_input_embeddings()`.
    """

    config: Any
    training: bool
    get_input_embeddings: Callable[[], nn.Module]
    thinking_projection: nn.Module
    thinking_residual_gate_r: nn.Module
    thinking_residual_gate_i: nn.Module
    thinking_residual_Lambda: ThinkingLambda
    thinking_control: Control | None = None  # stands between a residual and its blend

    def thinking_decay(self, embeds: Tensor) -> Tensor:
        """a = exp(-c softplus(-Λ) σ(W_r e + b_r)), from embeddings e (..., d); the share of e that a blend keeps."""
        with torch.autocast(embeds.device.type, enabled=False):
            gate = self.thinking_residual_gate_r(embeds.to(self.thinking_residual_Lambda.Lambda.dtype))
            return self.thinking_residual_Lambda(torch.sigmoid(wide(gate)))

    def thinking_residual(self, embeds: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """ê = a ⊙ e + sqrt(1 - a² + 1e-8) ⊙ (i ⊙ s), with i = σ(W_i e + b_i).

        Args:
            embeds: e (..., d), embeddings of the sampled tokens.
            residual: s (..., d).

        Returns:
            The blend (..., d) in the dtype of `embeds`, and a (..., d) in float32.
        """
        with torch.autocast(embeds.device.type, enabled=False):
            a = self.thinking_decay(embeds).to(embeds.device)  # a device_map may put modules on other devices
            e = embeds.to(a.dtype)
            gate = self.thinking_residual_gate_i(e.to(self.thinking_residual_Lambda.Lambda.dtype))
            gated = torch.sigmoid(wide(gate)).to(a.device) * residual.to(a)
            blended = a * e + torch.sqrt(1 - a.square() + EPS) * gated
        return blended.to(embeds.dtype), a

    def projected_residual(self, states: Tensor) -> Tensor:
        """s (..., d) in float32, from hidden states (..., d); with dropout only where a gradient is wanted."""
        thinking = self.config.thinking
        with torch.autocast(states.device.type, enabled=False):
            projected = wide(self.thinking_projection(states.to(self.thinking_residual_Lambda.Lambda.dtype)))
            rate = thinking.get("projection_dropout", 0.0)
            if rate and self.training and torch.is_grad_enabled():
                projected = dropout(projected, rate)
            residual = projection_residual(projected)
        return residual if (norm := self.residual_norm()) == 1.0 else residual * norm

    def residual_norm(self) -> float:
        """The norm of the projected residual: 1, or the mean norm of the input embeddings."""
        return self.embedding_norm() if scaled_to_embeddings(self.config.thinking) else 1.0

    @torch.no_grad()
    def embedding_norm(self) -> float:
        """The mean norm of the input embeddings, measured when it is first asked for and kept in `config.thinking`."""
        if self.config.thinking.get("embedding_norm") is None:
            table: Any = self.get_input_embeddings().weight
            norms = [rows.float().norm(dim=-1) for rows in table.split(4096)]
            self.config.thinking["embedding_norm"] = torch.cat(norms).mean().item()
        return self.config.thinking["embedding_norm"]

    def blend_thinking(self, embeds: Tensor, thinking: ThinkingInputs) -> Tensor:
        """Blend the masked ones of the last K input positions.

        Args:
            embeds: (B, L, d), the input embeddings.
            thinking: of the last K <= L positions.

        Raises:
            InputError: the model was built without thinking, or the shapes do not fit.
        """
        if not hasattr(self, "thinking_projection"):
            raise InputError("thinking_inputs were given to a plain model; build or load it with thinking={}.")
        states, mask = thinking.states, thinking.mask
        shape, width = getattr(states, "shape", None), mask.shape[-1]
        expected = (embeds.shape[0], width, embeds.shape[2])
        if states is None or shape != expected or mask.shape != expected[:2] or not 0 < width <= embeds.shape[1]:
            raise InputError(
                f"expected states (B, K, d) and a mask (B, K) with 0 < K <= L for input embeddings (B, L, d) = "
                f"{tuple(embeds.shape)}, got {shape and tuple(shape)} and {tuple(mask.shape)}."
            )
        head, tail = embeds[:, :-width], embeds[:, -width:]
        states, mask = states.to(embeds.device), mask.to(embeds.device)
        residual = RESIDUALS[thinking.residual or self.config.thinking["residual"]].make(self, states)
        if self.thinking_control is not None:
            residual, mask = self.thinking_control(residual, tail, mask)
        blended, _ = self.thinking_residual(tail, residual)
        return torch.cat([head, torch.where(mask.unsqueeze(-1), blended, tail)], dim=1)
