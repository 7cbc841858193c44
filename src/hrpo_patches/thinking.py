"""The maths of a thinking position, as modules that a model family gains; knows nothing of generation or training.

Shapes: d is the hidden size, `...` any leading shape. Everything here is computed in float32, the dtype of the
thinking modules, with autocast off, and only the blend is rounded to the model's dtype.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from hrpo_patches.config import Residual, ThinkingConfig, check_r_range
from hrpo_patches.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Base
else:
    _Base = object

DECAY_SCALE = 8.0  # c in a = exp(-c * softplus(-Lambda) * r)
EPS = 1e-8
MODULES = (
    "thinking_projection",
    "thinking_residual_gate_r",
    "thinking_residual_gate_i",
    "thinking_residual_Lambda",
)
_MODULE_PATTERN = re.compile(rf"(^|\.)({'|'.join(MODULES)})\.")


def is_thinking_parameter(name: str) -> bool:
    """Whether a parameter's dotted name, also one that PEFT or DDP has renamed, is a thinking weight's."""
    return _MODULE_PATTERN.search(name) is not None


def canonical(name: str) -> str:
    """A thinking parameter's dotted name without what PEFT puts around a trainable copy's."""
    return name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")


def initial_lambda(uniform: Tensor, r_min: float, r_max: float) -> Tensor:
    """Λ such that a = λ^r, with λ the point `uniform` (in (0, 1)) of the range from r_min to r_max; float64."""
    inset = 1e-4 + (1 - 2e-4) * uniform.double()  # float32 rounding must not push λ over an edge of the range
    lam = r_min + (r_max - r_min) * inset
    return -torch.log(torch.expm1(-torch.log(lam) / DECAY_SCALE))


def _peek_generator(role: str) -> torch.Generator:
    """A generator that follows the global seed and state but does not advance them: base weights stay as in stock."""
    with torch.random.fork_rng(devices=[]):
        seed = torch.randint(2**62, (), device="cpu").item()
    return torch.Generator().manual_seed((int(seed) + sum(role.encode())) % 2**63)


class _ThinkingModule(nn.Module):
    """A module that starts from `initial_values` on every way to life and never falls below float32."""

    role: str

    def initial_values(self) -> dict[str, Tensor]:
        """Fresh values on the CPU for each parameter, by name."""
        raise NotImplementedError  # pragma: no cover - each subclass has its own

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw fresh values. A parameter that was loaded from a checkpoint is left alone (transformers' own flag)."""
        for name, value in self.initial_values().items():
            parameter = getattr(self, name)
            init.copy_(parameter, value.to(device=parameter.device, dtype=parameter.dtype))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # `model.to(torch.bfloat16)` must not round these weights: AdamW's steps on them are smaller than a bf16 ulp.
        def keep_float32(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            rounded = out.is_floating_point() and out.dtype.itemsize < 4 <= tensor.dtype.itemsize
            return tensor.to(out.device) if rounded else out

        return super()._apply(keep_float32, recurse)


class ThinkingLinear(_ThinkingModule, nn.Linear):
    """A square float32 linear layer with weights ~ N(0, std²) and a zero bias, if any."""

    def __init__(self, size: int, bias: bool, std: float, role: str) -> None:
        self.std, self.role = std, role
        super().__init__(size, size, bias=bias, dtype=torch.float32)

    def initial_values(self) -> dict[str, Tensor]:
        generator = _peek_generator(self.role)
        values = {
            "weight": torch.empty(self.weight.shape, device="cpu", dtype=torch.float32).normal_(
                0.0, self.std, generator=generator
            )
        }
        if self.bias is not None:
            values["bias"] = torch.zeros(self.bias.shape, device="cpu", dtype=torch.float32)
        return values


class ThinkingLambda(_ThinkingModule):
    """The learned decay: r (..., d) in (0, 1) -> a (..., d) = exp(-c * softplus(-Lambda) * r)."""

    role = "thinking_residual_Lambda"

    def __init__(self, size: int, r_min: float, r_max: float) -> None:
        super().__init__()
        self.r_min, self.r_max = r_min, r_max
        self.Lambda = nn.Parameter(torch.empty(size, dtype=torch.float32))
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        uniform = torch.rand(
            self.Lambda.shape, generator=_peek_generator(self.role), device="cpu", dtype=torch.float32
        )
        return {"Lambda": initial_lambda(uniform, self.r_min, self.r_max)}

    @torch.no_grad()
    def reset_lambda_parameters(self, r_min: float, r_max: float) -> None:
        """Draw Λ anew so that a = λ^r with λ ~ U(r_min, r_max), also where Λ came from a checkpoint.

        Raises:
            InputError: unless 0 < r_min < r_max < 1.
        """
        check_r_range(r_min, r_max)
        self.r_min, self.r_max = r_min, r_max
        for value in self.initial_values().values():
            self.Lambda.copy_(value)

    def forward(self, r: Tensor) -> Tensor:
        return torch.exp(-DECAY_SCALE * nn.functional.softplus(-self.Lambda) * r)


def projection_residual(projected: Tensor) -> Tensor:
    """s = Wh / (‖Wh‖₂ + 1e-8), from `projected` = Wh (..., d)."""
    return projected / (torch.linalg.vector_norm(projected, dim=-1, keepdim=True) + EPS)


def embedding_residual(probabilities: Tensor, embeddings: Tensor) -> Tensor:
    """s = (Σ p E) / sqrt(Σ p²), from p (..., V) and E (V, d); the residual of the original HRPO."""
    expected = probabilities.to(embeddings.dtype) @ embeddings
    return expected / probabilities.square().sum(-1, keepdim=True).sqrt().to(embeddings.dtype)


class ThinkingMixin(_Base):
    """What a patched model family gains: the thinking modules, their initialisation and the blend."""

    def add_thinking_modules(self, config: Any) -> None:
        """Called by a patched backbone's `__init__` before `post_init`; adds nothing where `config.thinking` is False.

        Raises:
            InputError: `config.thinking` holds a value that cannot work.
        """
        thinking = ThinkingConfig.of(config)
        if thinking is None:
            return
        config.thinking = thinking.to_dict()
        size = config.hidden_size
        std = getattr(config, "initializer_range", None) or 0.02
        self.thinking_projection = ThinkingLinear(size, False, thinking.init_std, "thinking_projection")
        self.thinking_residual_gate_r = ThinkingLinear(size, True, std, "thinking_residual_gate_r")
        self.thinking_residual_gate_i = ThinkingLinear(size, True, std, "thinking_residual_gate_i")
        self.thinking_residual_Lambda = ThinkingLambda(size, thinking.r_min, thinking.r_max)
        # The first also keeps quantizers away, the second holds under bf16 as well as fp16.
        self._keep_in_fp32_modules = set(MODULES)
        self._keep_in_fp32_modules_strict = set(MODULES)
        if not thinking.in_checkpoint:
            self._keys_to_ignore_on_load_missing = {_MODULE_PATTERN.pattern}

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, _ThinkingModule):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        missing = sorted(key for key in loading_info.missing_keys if is_thinking_parameter(key))
        whole = [key for key, _ in self.named_parameters() if is_thinking_parameter(key)]
        thinking = ThinkingConfig.of(self.config)
        claimed = thinking is not None and thinking.in_checkpoint
        super()._adjust_missing_and_unexpected_keys(loading_info)
        if missing and (claimed or len(missing) < len(whole)):
            raise InputError(
                f"the checkpoint is to hold thinking weights, but {', '.join(missing)} is missing: it is damaged or "
                f"was saved without. To start all of them anew, load it once with thinking=False and save that."
            )

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(getattr(self.config, "thinking", None), dict):
            self.config.thinking["in_checkpoint"] = True
        return super().save_pretrained(*args, **kwargs)

    def thinking_decay(self, embeds: Tensor) -> Tensor:
        """a = exp(-c softplus(-Λ) σ(W_r e + b_r)), from embeddings e (..., d); the share of e that a blend keeps."""
        with torch.autocast(embeds.device.type, enabled=False):
            gate = self.thinking_residual_gate_r(embeds.to(self.thinking_residual_Lambda.Lambda.dtype))
            return self.thinking_residual_Lambda(torch.sigmoid(gate))

    def thinking_residual(self, embeds: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """ê = a ⊙ e + sqrt(1 - a² + 1e-8) ⊙ (i ⊙ s), with i = σ(W_i e + b_i).

        Args:
            embeds: e (..., d), embeddings of the sampled tokens.
            residual: s (..., d).

        Returns:
            The blend (..., d) in the dtype of `embeds`, and a (..., d) in float32.
        """
        with torch.autocast(embeds.device.type, enabled=False):
            a = self.thinking_decay(embeds)
            e = embeds.to(a.dtype)
            gated = torch.sigmoid(self.thinking_residual_gate_i(e)) * residual.to(a.dtype)
            blended = a * e + torch.sqrt(1 - a.square() + EPS) * gated
        return blended.to(embeds.dtype), a

    def blend_thinking(
        self, embeds: Tensor, states: Tensor | None, mask: Tensor | None, residual: Residual | None = None
    ) -> Tensor:
        """Blend the masked ones of the last K input positions.

        Args:
            embeds: (B, L, d), the input embeddings.
            states: (B, K, d), K <= L: what each position's residual is made from, the hidden state that produced its
                token (projection) or the finished residual (embedding).
            mask: (B, K) bool, which positions think.
            residual: what `states` are; by default what the config says.

        Raises:
            InputError: the model was built without thinking, one of the two is missing, or the shapes do not fit.
        """
        if not hasattr(self, "thinking_projection"):
            raise InputError("thinking_states were given to a model that was built with config.thinking=False.")
        if states is None or mask is None:
            raise InputError("thinking_states and thinking_mask belong together; one of them is missing.")
        width = states.shape[1]
        expected = (embeds.shape[0], width, embeds.shape[2])
        if states.shape != expected or mask.shape != expected[:2] or not 0 < width <= embeds.shape[1]:
            raise InputError(
                f"thinking_states {tuple(states.shape)} and thinking_mask {tuple(mask.shape)} have to be (B, K, d) "
                f"and (B, K) with 0 < K <= L, for input embeddings (B, L, d) = {tuple(embeds.shape)}."
            )
        head, tail = embeds[:, :-width], embeds[:, -width:]
        states = states.to(embeds.device)
        if (residual or self.config.thinking["residual"]) == "projection":
            with torch.autocast(embeds.device.type, enabled=False):
                states = states.to(self.thinking_residual_Lambda.Lambda.dtype)
                states = projection_residual(self.thinking_projection(states))
        blended, _ = self.thinking_residual(tail, states)
        return torch.cat([head, torch.where(mask.to(embeds.device).unsqueeze(-1), blended, tail)], dim=1)
