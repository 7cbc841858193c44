"""Makes a model and its adapter config ready to be trained."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import is_peft_model
from packaging.version import Version
from peft import PeftConfig
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import set_seed
from trl.trainer.utils import create_model_from_path

from hrpo_patches.models.backends import NO_BPTT, backend_of, refuse_stranger
from hrpo_patches.models.base import thinking_options
from hrpo_patches.thinking.adjoint import refuse_reentrant
from hrpo_patches.thinking.backbone import patched_backbone, temporarily, thinking_backbone
from hrpo_patches.thinking.decoding import changed_distribution
from hrpo_patches.thinking.sequential import refuse_dropout
from hrpo_patches.thinking.shards import partitioned
from hrpo_patches.training.config import HRPOConfig, ThinkingArguments
from hrpo_thinking.config import ThinkingConfig, check_same_kind, record_of
from hrpo_thinking.errors import InputError
from hrpo_thinking.marker import marker_table
from hrpo_thinking.parts import FALLBACK, RESIDUALS, canonical, is_thinking_parameter, parts_of

logger = logging.getLogger(__name__)


def policy(model: Any, args: HRPOConfig, quantization_config: Any = None) -> Any:
    """`model` as the run trains it: with the thinking modules, unless it is plain GRPO.

    A name is loaded here where thinking is to be said, with `args.model_init_kwargs` as TRL would.

    Raises:
        InputError: the model cannot think, thinks in another way already, or is told to in two ways.
    """
    if isinstance(model, str):
        if args.residual is not None:
            refuse_stranger(model)
        init: dict[str, Any] = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]  # TRL has read it
        asked = init.pop("thinking", None)
        if args.residual is not None:
            asked = thinking_options(model, _asked(asked) | args.chosen)
        return model if asked is None else _loaded(model, init | {"thinking": asked}, args, quantization_config)
    return thinking_policy(model, args)


def thinking_policy(model: Any, args: ThinkingArguments) -> Any:
    """As `policy`, of a model that is loaded already."""
    if args.residual is None:
        return model
    refuse_stranger(model)
    backbone = patched_backbone(model)
    current = record_of(ThinkingConfig.of(backbone.config) or ThinkingConfig(), backbone.config.thinking)
    check_same_kind(current, args.chosen, "this model")
    backbone.begin_thinking(ThinkingConfig.from_dict(current | args.chosen), current)
    return model


def _asked(given: Any) -> dict[str, Any]:
    """The options that `model_init_kwargs["thinking"]` names."""
    if given is False:
        raise InputError("model_init_kwargs say thinking=False; remove it, or train plain GRPO with residual=None.")
    if isinstance(given, dict):
        return given
    said = ThinkingConfig.of(SimpleNamespace(thinking=given))
    return asdict(said) if isinstance(given, ThinkingConfig) and said is not None else {}


def only_for_the_policy(args: HRPOConfig) -> AbstractContextManager[None]:
    """Keeps `thinking` from the reward models and references that a constructor loads by `model_init_kwargs`."""
    given: Any = args.model_init_kwargs or {}
    others = {name: value for name, value in given.items() if name != "thinking"}
    return temporarily(args, model_init_kwargs=others or None)


def _loaded(name: str, init: dict[str, Any], args: HRPOConfig, quantization_config: Any) -> Any:
    """The model of that name as `GRPOTrainer` loads it, from its seed on."""
    set_seed(args.seed)
    init.setdefault("trust_remote_code", args.trust_remote_code)
    if quantization_config is not None:
        init.setdefault("quantization_config", quantization_config)
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        init["device_map"] = None
    return create_model_from_path(name, **init)


ALREADY = "your model is already instantiated"  # which TRL warns of where it has options to load one with


@contextmanager
def unsaid(text: str) -> Iterator[None]:
    """Leave out what TRL's trainer warns of with this text."""
    logger = logging.getLogger("trl.trainer.grpo_trainer")

    def others(record: logging.LogRecord) -> bool:
        return text not in record.getMessage()

    logger.addFilter(others)
    try:
        yield
    finally:
        logger.removeFilter(others)


def with_thinking_modules(model: Any, peft_config: PeftConfig | None, args: ThinkingArguments) -> PeftConfig | None:
    """A copy of `peft_config` whose `modules_to_save` names the thinking modules that this run trains.

    Raises:
        InputError: the model is unsloth's, which must make its adapters itself, or this PEFT would not save all of it.
    """
    if peft_config is None:
        return None
    if not isinstance(model, str) and backend_of(model).own_adapters:
        raise InputError(
            "this model runs unsloth's forward, which needs an adapter that unsloth made; leave peft_config out, and "
            "wrap the model with FastLanguageModel.get_peft_model(model, ..., modules_to_save=[...])."
        )
    if getattr(peft_config, "bias", None) == "lora_only" and Version(version("peft")) < Version("0.21"):
        raise InputError(
            "PEFT before 0.21 does not save the biases that bias='lora_only' trains; install peft 0.21 or newer, or "
            "use bias='all'."
        )
    wanted: Any = copy.deepcopy(peft_config)
    modules = parts_of(args.residual)
    wanted.modules_to_save = list(dict.fromkeys([*(wanted.modules_to_save or []), *modules]))
    return wanted


def float32_copies(model: Any) -> dict[str, Tensor]:
    """The thinking weights before TRL touches them, by canonical name; trained copies win over frozen originals."""
    if isinstance(model, str):
        return {}
    named = [(name, p) for name, p in model.named_parameters() if is_thinking_parameter(name)]
    named.sort(key=lambda item: ".modules_to_save." in item[0])
    return {canonical(name).replace(".original_module", ""): p.detach().clone() for name, p in named}


def check_model(model: Any, base: Any, tokenizer: Any, args: ThinkingArguments, rollout: Any) -> None:
    """Refuse a model that would fall back, would not train its thinking weights, or cannot take the gradient.

    The norm of its embeddings is measured, if the residual takes it, before training can change them.

    Args:
        model: the trainer's, unwrapped.
        base: the causal language model in it.
        tokenizer: must spell the marker.
        args: of the run.
        rollout: the trainer's generation config; None if nothing is sampled.
    """
    if partitioned(base):
        raise InputError(
            "ZeRO-3 sharded this model when it was loaded, after the training arguments were made, and it cannot be "
            "looked at so; load it before them, or use FSDP2 or ZeRO-2, as hrpo train has to."
        )
    backbone = thinking_backbone(base)
    marker_table(tokenizer, args.answer_start, backbone.config.vocab_size)
    _check_visible(tokenizer, args.answer_start)
    for name in parts_of(args.residual):
        module = getattr(backbone, name)
        copied = isinstance(module, ModulesToSaveWrapper)
        saved, trained = copied or not is_peft_model(model), module.modules_to_save if copied else module
        if not (saved and all(parameter.requires_grad for parameter in trained.parameters())):
            raise InputError(
                f"{name} is frozen, or would not be saved; pass peft_config to HRPOTrainer instead of a wrapped "
                f"model, or load the adapter with hrpo_patches.load_adapter(..., is_trainable=True)."
            )
    with torch.no_grad():
        probe = torch.zeros(1, 2, dtype=torch.long, device=next(base.parameters()).device)
        outputs = model(input_ids=probe, output_last_hidden_state=True, use_cache=False)
    kind = RESIDUALS[backbone.config.thinking["residual"]]
    if kind.needs_state and getattr(outputs, "last_hidden_state", None) is None:
        raise InputError(
            f"the forward of {type(base).__name__} returns no last_hidden_state, so the {kind.name} would never "
            f"be used or trained; unwrap the model, or train with residual={FALLBACK!r}."
        )
    backend = backend_of(base)
    if args.bptt is None:
        args.bptt = backend.bptt  # type: ignore[assignment]
        if not backend.bptt:
            logger.warning(f"bptt is 0, the published gradient: {NO_BPTT}")
    from_start = args.from_start
    if (args.depth or from_start) and not backend.bptt:
        raise InputError(NO_BPTT)
    if args.gradient_checkpointing and not backend.own_checkpointing:
        given: Any = args.gradient_checkpointing_kwargs or {"use_reentrant": False}  # which is transformers' default
        refuse_reentrant(given, args.depth)
    if args.depth == "sequential":
        refuse_dropout(backbone, today=False)
    if rollout is not None and (args.depth or from_start) and not kind.needs_state:
        check_distribution(rollout)
    backbone.residual_norm()


def _check_visible(tokenizer: Any, marker: str) -> None:
    """Refuse a marker that a reward function would not see, for TRL leaves special tokens out of completions."""
    ids = tokenizer.encode(marker, add_special_tokens=False)
    if marker not in tokenizer.decode(ids, skip_special_tokens=True) and marker in tokenizer.decode(ids):
        raise InputError(
            f"the marker {marker!r} is a special token of this tokenizer, which no reward function sees; choose "
            f"another answer_start, or add it as a token that is not special."
        )


def check_distribution(rollout: Any) -> None:
    """Refuse a rollout whose distribution a live state cannot make again: that is taken from the temperature alone.

    Args:
        rollout: the trainer's generation config.
    """
    changed = changed_distribution(rollout)
    if changed is not None:
        raise InputError(
            f"{changed[0]}={changed[1]!r} changes the distribution that the embedding residual is made from, and "
            f"bptt, or the reference 'start', makes it again from the temperature alone; remove it, or set bptt=0."
        )


def restore_float32(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Undo a cast of thinking weights, as TRL does one for every trainable weight of a quantized model (QLoRA)."""
    for name, parameter in model.named_parameters():
        if is_thinking_parameter(name) and parameter.dtype != torch.float32:
            value = before.get(canonical(name), parameter)
            parameter.data = value.to(device=parameter.device, dtype=torch.float32)


def freeze_unused(model: nn.Module, args: ThinkingArguments) -> None:
    """Freeze the thinking weights that this run does not use: DDP waits for the gradient of every trainable weight."""
    used = parts_of(args.residual)
    for name, parameter in model.named_parameters():
        if is_thinking_parameter(name) and not set(name.split(".")) & set(used):
            parameter.requires_grad_(False)
