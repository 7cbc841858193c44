"""How a trained adapter thinks, written beside PEFT's files and read again."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from hrpo_patches.models.hub import find_file
from hrpo_patches.thinking.backbone import causal_lm
from hrpo_patches.thinking.mixin import ThinkingMixin
from hrpo_thinking.config import OPTIONS, ThinkingConfig, about_parts, mismatch, record_of
from hrpo_thinking.errors import InputError, require
from hrpo_thinking.parts import parts_of, spelled

THINKING_FILE = "thinking_config.json"
GENERATION_FILE = "generation_config.json"


def save_thinking(model: PreTrainedModel | PeftModel, folder: str | Path) -> None:
    """Write `thinking_config.json` and `generation_config.json` for `model`, also a PEFT one, into `folder`."""
    base = causal_lm(model)
    thinking = ThinkingConfig.of(base.config)
    assert thinking is not None  # callers ask whether the model thinks
    write_thinking(record_of(thinking, base.config.thinking), base.config.hidden_size, base.generation_config, folder)


def write_thinking(
    thinking: dict[str, Any], hidden_size: int, generation_config: GenerationConfig, folder: str | Path
) -> None:
    """The two files of `save_thinking`, from a `record_of` the thinking, where the base model is not at hand."""
    record = thinking | {"hidden_size": hidden_size, "modules": parts_of(thinking["residual"])}
    record.pop("in_checkpoint")
    (Path(folder) / THINKING_FILE).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    generation: Any = copy.deepcopy(generation_config)  # with the fields that the patches add
    generation.thinking, generation.thoughts = True, thinking["thoughts"] or None
    generation._from_model_config = False  # or loading it would take its fields for a model's
    generation.save_pretrained(folder)


def save_pauses(fillers: list[int], ends: int | list[int] | None, folder: str | Path) -> None:
    """Write the forced thoughts and the end tokens of an adapter that does not think, for `load_plain_adapter`."""
    pauses = GenerationConfig(thoughts=len(fillers), filler_token_id=fillers[0], eos_token_id=ends)
    pauses.save_pretrained(folder)


def check_same_pauses(folder: Path, thoughts: int) -> None:
    """Raise `InputError` unless a run without thinking that wrote `folder` had so many forced thoughts."""
    saved: Any = GenerationConfig.from_pretrained(folder) if (folder / GENERATION_FILE).is_file() else None
    own = getattr(saved, "thoughts", None) or 0
    require(own == thoughts, f"{folder} was trained with --thoughts {own}, not {thoughts}.")


def read_thinking(folder: Path) -> dict[str, Any] | None:
    """The thinking that `save_thinking` wrote into `folder`, None if it did not; an `InputError` if it is damaged."""
    if not (folder / THINKING_FILE).is_file():
        return None
    try:
        record = json.loads((folder / THINKING_FILE).read_text())
        ThinkingConfig(record["residual"], record["answer_start"])
    except InputError as error:
        raise InputError(f"{folder / THINKING_FILE} asks for what is not there: {error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / THINKING_FILE} is damaged: {error!r}.") from None
    return record


def _record_at(source: object, **hub: Any) -> dict[str, Any] | None:
    """How the adapter at `source`, a folder or a hub id, says that it thinks; None where it does not."""
    file = find_file(source, THINKING_FILE, **hub) if isinstance(source, (str, Path)) else None
    return read_thinking(file.parent) if file is not None else None


def check_thinking_adapter(model: nn.Module, source: object, hub: dict[str, Any] | None = None) -> None:
    """Called by PEFT before it loads an adapter's weights into `model`; looks at nothing unless that model thinks.

    Args:
        model: a PEFT model, of any module.
        source: a folder or a hub id.
        hub: how the caller asks the hub: token, revision, cache_dir and the like.

    Raises:
        InputError: the adapter was trained to think in another way than the model was built to.
    """
    base = causal_lm(model)
    thinking = ThinkingConfig.of(base.config) if isinstance(base, ThinkingMixin) else None
    if thinking is None or (saved := _record_at(source, **hub or {})) is None:
        return  # a plain model has been refused by `check_modules_to_save`
    if (difference := mismatch(saved, asdict(thinking))) is not None:
        name, trained, built = difference
        raise InputError(
            f"{source} was trained with {name}={trained!r}, and this model was built with {built!r}; load it with "
            f"hrpo_patches.load_adapter(model, folder), which builds the model as the adapter needs it."
        )


def refuse_thinking_adapter(source: object) -> None:
    """Called by transformers' own `load_adapter`, which cannot build a model as an adapter needs it.

    Raises:
        InputError: the adapter thinks.
    """
    text = f"{source} thinks; load it with hrpo_patches.load_adapter(base, folder), which knows how."
    require(_record_at(source) is None, text)


def check_same_thinking(
    folder: Path, residual: str | None, thinking: ThinkingConfig | None, same_thoughts: bool = True
) -> None:
    """Raise `InputError` unless what `folder` holds was trained with this residual (if given) and this thinking.

    With the residual given, the filler must be the same, too, and the number of forced thoughts if `same_thoughts`.
    """
    saved = read_thinking(folder)
    own = spelled(saved["residual"] if saved is not None else None)
    require(residual is None or own == residual, f"{folder} was trained with --residual {own}, not {residual}.")
    if saved is None or thinking is None:
        return
    # An adapter may be trained further with other forced thoughts.
    forced = () if residual is None else ("thoughts", "filler") if same_thoughts else ("filler",)
    variant = [name for name in about_parts() if own == thinking.residual and OPTIONS[name].part in parts_of(own)]
    if (difference := mismatch(saved, asdict(thinking), ("answer_start", "span", *forced, *variant))) is not None:
        name, value, other = difference
        raise InputError(f"{folder} was trained with --{name} {value!r}, not {other!r}.")
