"""The modules that a model family gains: float32, with a start of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from hrpo_thinking.config import ThinkingConfig, check_r_range
from hrpo_thinking.parts import GATE_I, GATE_R, LAMBDA, MODULES, PROJECTION

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

DECAY_SCALE = 8.0  # c in a = exp(-c * softplus(-Lambda) * r)


def wide(values: Tensor) -> Tensor:
    """Values in float32 at least: 1 - a² of an a in 16 bits, which DeepSpeed makes of float32, is noise near a = 1."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


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


def _sample(values: Tensor) -> Tensor:
    """Some 64 of the values, float32 on the CPU: a step of any optimizer changes at least one of them."""
    flat = values.flatten()
    return flat[:: max(1, flat.numel() // 64)].to("cpu", torch.float32, copy=True)


class ThinkingModule(nn.Module):
    """A module that starts from `initial_values` on every way to life and never falls below float32."""

    role: str
    fresh: dict[str, Tensor]

    def initial_values(self) -> dict[str, Tensor]:
        """Fresh values on the CPU for each parameter, by name."""
        raise NotImplementedError  # pragma: no cover - each subclass has its own

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw fresh values. A parameter that was loaded from a checkpoint is left alone (transformers' own flag)."""
        if all(parameter.is_meta for parameter in self.parameters(recurse=False)):
            return  # a shape without values: `info`, or from_pretrained before it has read any
        self.fresh = {}
        for name, value in self.initial_values().items():
            parameter = getattr(self, name)
            init.copy_(parameter, value.to(device=parameter.device, dtype=parameter.dtype))
            self.fresh[name] = _sample(value)

    def is_fresh(self) -> bool:
        """Whether the weights are still the ones that were drawn: neither trained nor loaded."""
        if not hasattr(self, "fresh"):
            return False
        named = self.named_parameters(recurse=False)
        return all(torch.equal(self.fresh[name], _sample(parameter.detach())) for name, parameter in named)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # `model.to(torch.bfloat16)` must not round these weights: AdamW's steps on them are smaller than a bf16 ulp.
        def keep_float32(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            rounded = out.is_floating_point() and out.dtype.itemsize < 4 <= tensor.dtype.itemsize
            return tensor.to(out.device) if rounded else out

        return super()._apply(keep_float32, recurse)


class ThinkingLinear(ThinkingModule, nn.Linear):
    """A float32 linear layer, square by default, with weights ~ N(0, std²) and a zero bias, if any."""

    def __init__(self, size: int, bias: bool, std: float, role: str, out: int | None = None) -> None:
        self.std, self.role = std, role
        super().__init__(size, out or size, bias=bias, dtype=torch.float32)

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


class ThinkingNorm(ThinkingModule, nn.LayerNorm):
    """A float32 LayerNorm."""

    def __init__(self, size: int) -> None:
        super().__init__(size, dtype=torch.float32)

    def initial_values(self) -> dict[str, Tensor]:
        ones = torch.ones(self.weight.shape, device="cpu", dtype=torch.float32)
        return {"weight": ones, "bias": torch.zeros_like(ones)}


class ThinkingProjection(nn.Module):
    """The projection's variants, h (..., d) -> (..., d): one or two linear layers, SiLU between, LayerNorm after."""

    def __init__(self, size: int, thinking: ThinkingConfig) -> None:
        super().__init__()
        role = PROJECTION
        if thinking.projection_layers == 1:
            self.layers = nn.Sequential(ThinkingLinear(size, False, thinking.init_std, role))
        else:
            hidden = thinking.projection_hidden or size
            self.layers = nn.Sequential(
                ThinkingLinear(size, False, size**-0.5, f"{role}.0", hidden),  # SiLU near 0 would be linear
                nn.SiLU(),
                ThinkingLinear(hidden, False, thinking.init_std, f"{role}.1", size),
            )
        self.norm = ThinkingNorm(size) if thinking.projection_norm else nn.Identity()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(self.layers(hidden))


def make_projection(size: int, thinking: ThinkingConfig) -> nn.Module:
    """`thinking_projection`: a bare linear layer unless the config asks for a variant with weights of its own."""
    if thinking.projection_layers == 1 and not thinking.projection_norm:
        return ThinkingLinear(size, False, thinking.init_std, PROJECTION)
    return ThinkingProjection(size, thinking)


class ThinkingLambda(ThinkingModule):
    """The learned decay: r (..., d) in (0, 1) -> a (..., d) = exp(-c * softplus(-Lambda) * r)."""

    role = LAMBDA

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
        """Draw Λ again so that a = λ^r with λ ~ U(r_min, r_max), also where Λ came from a checkpoint.

        Raises:
            InputError: unless 0 < r_min < r_max < 1.
        """
        check_r_range(r_min, r_max)
        self.r_min, self.r_max = r_min, r_max
        for name, value in self.initial_values().items():
            self.Lambda.copy_(value)
            self.fresh = {name: _sample(value)}

    def forward(self, r: Tensor) -> Tensor:
        return torch.exp(-DECAY_SCALE * nn.functional.softplus(-wide(self.Lambda)) * wide(r))

    def decay(self) -> Tensor:
        """λ (d,), the share of an embedding that is left at a fully open gate: a = λ^r."""
        return torch.exp(-DECAY_SCALE * nn.functional.softplus(-wide(self.Lambda)))


def thinking_modules(config: PreTrainedConfig, thinking: ThinkingConfig) -> dict[str, nn.Module]:
    """The modules of a backbone that thinks, by the name that each has on it.

    Args:
        config: the model's; its `hidden_size` and, for the gates' start, its `initializer_range` (else 0.02).
        thinking: how it thinks.
    """
    size, std = config.hidden_size, getattr(config, "initializer_range", None) or 0.02
    modules = (
        make_projection(size, thinking),
        ThinkingLinear(size, True, std, GATE_R),
        ThinkingLinear(size, True, std, GATE_I),
        ThinkingLambda(size, thinking.r_min, thinking.r_max),
    )
    return dict(zip(MODULES, modules, strict=True))
