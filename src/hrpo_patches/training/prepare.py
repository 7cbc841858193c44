"""Makes a model and its adapter config ready to be trained."""

from __future__ import annotations

import copy
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from packaging.version import Version
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed
from transformers.utils.quantization_config import QuantizationConfigMixin
from trl.trainer.utils import create_model_from_path

from hrpo_patches.models.backends import backend_of, refuse_stranger
from hrpo_patches.models.base import thinking_options
from hrpo_patches.thinking.backbone import patched_backbone
from hrpo_patches.training.config import HRPOConfig, ThinkingArguments
from hrpo_thinking.config import ThinkingConfig, check_same_kind, record_of
from hrpo_thinking.errors import InputError
from hrpo_thinking.parts import canonical, is_thinking_parameter, parts_of

if TYPE_CHECKING:
    from hrpo_patches.thinking.backbone import Model


def policy(
    model: str | Model, args: HRPOConfig, quantization_config: QuantizationConfigMixin | None = None
) -> str | Model:
    """`model` as the run trains it: with the thinking modules, unless it is plain GRPO.

    If thinking is configured, a model's name is loaded here, with `args.model_init_kwargs` as TRL would.

    Raises:
        InputError: the model cannot think, thinks in another way already, or is told to in two ways.
    """
    if isinstance(model, str):
        if args.residual is not None:
            refuse_stranger(model)
        # A copy: the user's own arguments are as they were, for the next trainer.
        init: dict[str, Any] = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]  # TRL has read it
        thinking = init.pop("thinking", None)
        if args.residual is not None:
            thinking = thinking_options(model, _options(thinking) | args.chosen)
        return model if thinking is None else _loaded(model, init | {"thinking": thinking}, args, quantization_config)
    return thinking_policy(model, args)


def thinking_policy(model: Model, args: ThinkingArguments) -> Model:
    """As `policy`, of a model that is loaded already."""
    if args.residual is None:
        return model
    refuse_stranger(model)
    backbone = patched_backbone(model)
    # What the run does not choose stays as the model has it: trained weights may depend on it.
    current = record_of(ThinkingConfig.of(backbone.config) or ThinkingConfig(), backbone.config.thinking)
    check_same_kind(current, args.chosen, "this model")
    backbone.begin_thinking(ThinkingConfig.from_dict(current | args.chosen), current)
    return model


def _options(thinking: object) -> dict[str, Any]:
    """The options that `model_init_kwargs["thinking"]` names."""
    if thinking is False:
        raise InputError("model_init_kwargs say thinking=False; remove it, or train plain GRPO with residual=None.")
    if isinstance(thinking, dict):
        return thinking
    return asdict(thinking) if isinstance(thinking, ThinkingConfig) else {}


def _loaded(
    name: str, init: dict[str, Any], args: HRPOConfig, quantization_config: QuantizationConfigMixin | None
) -> PreTrainedModel:
    """The model of that name as `GRPOTrainer` loads it, from its seed on."""
    set_seed(args.seed)  # as TRL does before it loads a model: fresh modules are drawn here
    init.setdefault("trust_remote_code", args.trust_remote_code)
    if quantization_config is not None:
        init.setdefault("quantization_config", quantization_config)
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        init["device_map"] = None
    return create_model_from_path(name, **init)


def with_thinking_modules(
    model: str | Model, peft_config: PeftConfig | None, args: ThinkingArguments
) -> PeftConfig | None:
    """A copy of `peft_config` whose `modules_to_save` names the thinking modules that this run trains.

    Raises:
        InputError: the model is unsloth's, which must make its adapters itself, or this PEFT would not save all of it.
    """
    if peft_config is None:
        return None
    if not isinstance(model, str) and backend_of(model).own_adapters:
        raise InputError(
            "this model runs unsloth's forward, which needs an adapter that unsloth made; remove peft_config, and "
            "wrap the model with FastLanguageModel.get_peft_model(model, ..., modules_to_save=[...])."
        )
    if getattr(peft_config, "bias", None) == "lora_only" and Version(version("peft")) < Version("0.21"):
        raise InputError(
            "PEFT before 0.21 does not save the biases that bias='lora_only' trains; install peft 0.21 or newer, or "
            "use bias='all'."
        )
    config: Any = copy.deepcopy(peft_config)  # LoraConfig and others; not every PEFT method has modules_to_save
    config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *parts_of(args.residual)]))
    return config


def float32_copies(model: str | nn.Module) -> dict[str, Tensor]:
    """The thinking weights before TRL touches them, by canonical name; trained copies win over frozen originals."""
    if isinstance(model, str):
        return {}
    named = [(name, p) for name, p in model.named_parameters() if is_thinking_parameter(name)]
    # Both have the same canonical name; of a dict's entries the last one stays.
    named.sort(key=lambda item: ".modules_to_save." in item[0])
    return {canonical(name).replace(".original_module", ""): p.detach().clone() for name, p in named}


def restore_float32(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Undo a cast of thinking weights, as TRL does one for every trainable weight of a quantized model (QLoRA)."""
    for name, parameter in model.named_parameters():
        if is_thinking_parameter(name) and parameter.dtype != torch.float32:
            # The copy, and not the cast value, which has lost what bfloat16 cannot hold.
            value = before.get(canonical(name), parameter)
            parameter.data = value.to(device=parameter.device, dtype=torch.float32)


def freeze_unused(model: nn.Module, args: ThinkingArguments) -> None:
    """Freeze the thinking weights that this run does not use: DDP waits for the gradient of every trainable weight."""
    used = parts_of(args.residual)
    for name, parameter in model.named_parameters():
        if is_thinking_parameter(name) and not set(name.split(".")) & set(used):
            parameter.requires_grad_(False)
