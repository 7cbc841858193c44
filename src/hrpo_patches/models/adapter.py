"""Loads trained adapters so that the model thinks as it did in training.

An adapter folder holds PEFT's `adapter_config.json` and `adapter_model.safetensors` (LoRA and the thinking modules, as
`modules_to_save`), and beside them `thinking_config.json` and a `generation_config.json` with `thinking: true`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from hrpo_patches.models.backends import backend_of, refuse_stranger
from hrpo_patches.models.hub import CONFIG, adapter_folder
from hrpo_patches.models.record import GENERATION_FILE, THINKING_FILE, read_thinking
from hrpo_patches.thinking.backbone import patched_backbone
from hrpo_thinking.config import OPTIONS, ThinkingConfig, about_parts
from hrpo_thinking.errors import InputError, require
from hrpo_thinking.parts import FALLBACK, MODULES, PROJECTION, RESIDUALS, is_thinking_parameter, parts_of


def weights_of(folder: Path) -> dict[str, Tensor]:
    """The weights in an adapter's folder, by name; an `InputError` if their file is damaged."""
    try:
        return load_file(folder / "adapter_model.safetensors")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder / 'adapter_model.safetensors'} is damaged or cannot be read: {error}.") from None


def config_of(folder: Path) -> Any:
    """What PEFT wrote of an adapter, a `PeftConfig`; an `InputError` if it is missing or damaged."""
    folder = adapter_folder(folder)
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / CONFIG} is damaged: {error}.") from None


def _check_fit(problem: str | None, folder: Path, model: PreTrainedModel) -> None:
    """Raise `InputError` if there is a problem with an adapter on this base model."""
    if problem is not None:
        named = config_of(folder).base_model_name_or_path
        trained_on = f"the adapter was trained on {named!r}; load that one" if named else "load the adapter's own"
        raise InputError(
            f"{folder} is damaged, or belongs to another base model: {problem}. This base model is a "
            f"{type(model).__name__} ({model.name_or_path or 'without a name'}); {trained_on}."
        )


def _misfit(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> str | None:
    """Which expected thinking weight is missing or has another shape."""
    for key, parameter in expected.items():
        if key not in weights:
            return f"{key} is missing"
        if weights[key].shape != parameter.shape:
            return f"{key} is {tuple(weights[key].shape)}, and this base model needs {tuple(parameter.shape)}"
    return None


def check_same_base(folder: Path, model: PreTrainedModel) -> None:
    """Raise `InputError` if PEFT's config says that an adapter belongs to a model of another class."""
    config = config_of(folder)
    kind = (config.auto_mapping or {}).get("base_model_class")
    same = kind is None or kind in {base.__name__ for base in type(model).__mro__}
    _check_fit(None if same else f"it is an adapter for {kind}, not for {type(model).__name__}", folder, model)


@contextmanager
def _restored_on_failure(model: PreTrainedModel) -> Iterator[None]:
    """Within, an error leaves `model` as it was: its modules, its configs, and what requires a gradient.

    PEFT puts its layers into a model before it looks at weights, and `unload` does not take all of that back.
    """
    changeable = [vars(part) for part in (*model.modules(), model.config, model.generation_config) if part is not None]
    # Each attribute, and of tables (modules, parameters, hooks) what is in them: they stay the same objects.
    before = [
        {name: (value, copy(value) if isinstance(value, (dict, set)) else None) for name, value in attributes.items()}
        for attributes in changeable
    ]
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    except BaseException:
        for attributes, saved in zip(changeable, before, strict=True):
            attributes.clear()
            for name, (value, content) in saved.items():
                attributes[name] = value
                if content is not None:
                    value.clear()
                    value.update(content)
        for parameter, requires_grad in trainable.items():
            parameter.requires_grad_(requires_grad)
        raise


def load_plain_adapter(model: PreTrainedModel, folder: str | Path) -> PeftModel:
    """Load an adapter without thinking weights (`--residual none`); where that fails, `model` is as before.

    Raises:
        InputError: it belongs to another base model.
    """
    folder = Path(folder)
    check_same_base(folder, model)
    with _restored_on_failure(model):
        try:
            peft_model, problem = PeftModel.from_pretrained(model, str(folder)).eval(), None
        except RuntimeError as error:  # sizes differ
            problem = " ".join(str(error).split())
        _check_fit(problem, folder, model)
        weights, own = set(weights_of(folder)), set(get_peft_model_state_dict(peft_model))
        if other := sorted(weights ^ own):
            where = "that this base model has no place for" if other[0] in weights else "missing"
            _check_fit(f"{other[0]} is {where}", folder, model)
    if (folder / GENERATION_FILE).is_file():
        pauses = GenerationConfig.from_pretrained(folder)
        for name in ("thoughts", "filler_token_id"):
            setattr(peft_model.generation_config, name, getattr(pauses, name))
    _take_ends(peft_model, folder)
    return peft_model


def _take_ends(model: PeftModel, folder: Path) -> None:
    """Let completions end where they ended in training, which the adapter's own file says."""
    if (folder / GENERATION_FILE).is_file():
        ends = GenerationConfig.from_pretrained(folder).eos_token_id
        model.generation_config.eos_token_id = ends if ends is not None else model.generation_config.eos_token_id


def holds_thinking(folder: Path) -> bool:
    """Whether an adapter's folder says how it thinks, or holds thinking weights (published HRPO adapters)."""
    if (folder / THINKING_FILE).is_file() or not (folder / "adapter_model.safetensors").is_file():
        return True  # what is missing is load_adapter's to say
    with safe_open(folder / "adapter_model.safetensors", "pt") as weights:
        return any(is_thinking_parameter(key) for key in weights.keys())  # noqa: SIM118 - it is not a dict


def load_adapter(
    model: str | PreTrainedModel,
    folder: str | Path,
    residual: str | None = None,
    init_projection: bool = False,
    is_trainable: bool = False,
) -> PeftModel:
    """Load a trained adapter so that the model thinks as it did in training; where that fails, `model` is as before.

    Args:
        model: the base model, or where to load it from. A plain one gains thinking modules; its `config.thinking` is
            set to the adapter's.
        folder: a folder or a hub id of what HRPOTrainer saved, or of a published HRPO adapter (LoRA, gates and Λ).
        residual: by default what the adapter was trained with.
        init_projection: start a fresh projection for an adapter that has none, to train it further.
        is_trainable: whether the adapter's weights require gradients.

    Returns:
        The PEFT model; its `generation_config.thinking` is True.

    Raises:
        InputError: no adapter there, a thinking weight is missing or of another size, or a projection is asked of an
            adapter that has none.
    """
    text = "load_adapter takes a base model, and this one already has an adapter; load the base again."
    require(not isinstance(model, PeftModel), text)
    folder = adapter_folder(folder)
    weights, own_modules = _read_weights(folder)
    published = {"residual": next((name for name in RESIDUALS if set(parts_of(name)) <= own_modules), FALLBACK)}
    record = read_thinking(folder) or published  # a published adapter's weights alone say how it thinks
    residual = residual or record["residual"]
    require(
        init_projection or PROJECTION not in set(parts_of(residual)) - own_modules,
        f"{folder} has no thinking_projection (it was trained with the embedding residual); load it with "
        f"residual='embedding', or start a new projection with init_projection=True (--init_projection).",
    )
    base = _base_model(model, folder, record)
    options = {key: record[key] for key in OPTIONS if key in record}
    if PROJECTION not in parts_of(residual) and _drop_variant(options):
        own_modules.discard(PROJECTION)  # a projection of another kind, which this residual has no use for
        weights = {key: value for key, value in weights.items() if f".{PROJECTION}." not in key}
    thinking = ThinkingConfig.from_dict(options | {"residual": residual})
    backbone = patched_backbone(base)
    with _restored_on_failure(base):
        backbone.begin_thinking(thinking, record)
        modules = sorted(own_modules | set(parts_of(residual)))
        expected = {
            f"base_model.model.{base.base_model_prefix}.{module}.{name}": parameter
            for module in modules
            for name, parameter in getattr(backbone, module).named_parameters()
        }
        if init_projection and PROJECTION not in own_modules:
            weights |= {key: value.detach().clone() for key, value in expected.items() if f".{PROJECTION}." in key}
        _check_fit(_misfit(weights, expected), folder, base)
        peft_model = _attach(base, folder, modules, weights, is_trainable)
        peft_model.generation_config.thinking = True
        peft_model.generation_config.thoughts = thinking.thoughts or None
        peft_model.generation_config.filler_token_id = None  # the adapter's is known by name
        _take_ends(peft_model, folder)
        return backend_of(base).finish_adapter(peft_model, is_trainable)


def _read_weights(folder: Path) -> tuple[dict[str, Tensor], set[str]]:
    """The adapter's weights by name, and the thinking modules that it holds.

    Raises:
        InputError: it is not an adapter, or holds no thinking weights.
    """
    file = folder / "adapter_model.safetensors"
    # LoRA's bias="all" writes the biases of modules_to_save twice more, under PEFT's inner names.
    inner = {"modules_to_save", "original_module"}
    read = weights_of(folder) if file.is_file() else {}
    weights = {key: value for key, value in read.items() if not inner & set(key.split("."))}
    own_modules = {name for name in MODULES if any(f".{name}." in key for key in weights)}
    if not own_modules:
        raise InputError(
            f"{folder} holds no thinking weights; load a plain adapter with load_plain_adapter."
            if file.is_file()
            else f"{folder} holds no adapter: {file.name} is missing."
        )
    return weights, own_modules


def _base_model(model: str | PreTrainedModel, folder: Path, record: dict[str, Any]) -> PreTrainedModel:
    """The base model, loaded if `model` is a name.

    Raises:
        InputError: its family cannot think, or the adapter belongs to another base model.
    """
    refuse_stranger(model)
    base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model) if isinstance(model, str) else model
    check_same_base(folder, base)
    size = record.get("hidden_size", base.config.hidden_size)
    same = size == base.config.hidden_size
    _check_fit(None if same else f"it has hidden size {size}, not {base.config.hidden_size}", folder, base)
    return base


def _attach(
    base: PreTrainedModel, folder: Path, modules: list[str], weights: dict[str, Tensor], is_trainable: bool
) -> PeftModel:
    """The PEFT model of an adapter with these thinking modules and weights.

    Raises:
        InputError: weights are missing, or the base model has no place for them.
    """
    config = config_of(folder)
    config.modules_to_save = sorted((set(config.modules_to_save or []) - {PROJECTION}) | set(modules))
    config.inference_mode = not is_trainable
    peft_model = get_peft_model(base, config)
    problem = None
    try:
        result: Any = set_peft_model_state_dict(peft_model, weights)
        lost = [key for key in result.missing_keys if "lora_" in key or ".modules_to_save." in key]
        if result.unexpected_keys:
            problem = f"it holds {result.unexpected_keys[0]}, which this base model has no place for"
        elif lost:
            problem = f"{lost[0]} is missing"
    except RuntimeError as error:  # sizes differ
        problem = " ".join(str(error).split())
    _check_fit(problem, folder, base)
    return peft_model


def _drop_variant(options: dict[str, Any]) -> bool:
    """Take what is about the projection out of `options`; whether it gave it weights of other shapes."""
    kind = {name: options.pop(name, getattr(ThinkingConfig, name)) for name in about_parts()}
    return any(kind[name] != getattr(ThinkingConfig, name) for name in kind if OPTIONS[name].shapes)
