"""How a trained adapter thinks, written beside PEFT's files and read again."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from hrpo_patches.models.hub import find_file
from hrpo_patches.thinking.backbone import causal_lm
from hrpo_patches.thinking.mixin import ThinkingMixin
from hrpo_thinking.config import OPTIONS, ThinkingConfig, about_parts, mismatch, record_of
from hrpo_thinking.errors import InputError
from hrpo_thinking.parts import parts_of, spelled

THINKING_FILE = "thinking_config.json"
GENERATION_FILE = "generation_config.json"


def save_thinking(model: PreTrainedModel, folder: str | Path) -> None:
    """Write `thinking_config.json` and `generation_config.json` for `model`, also a PEFT one, into `folder`."""
    base = causal_lm(model)
    thinking = ThinkingConfig.of(base.config)
    if thinking is None:
        raise InputError("expected a model that thinks, got a plain one: it has nothing of thinking to save.")
    write_thinking(record_of(thinking, base.config.thinking), base.config.hidden_size, base.generation_config, folder)


def write_thinking(thinking: dict[str, Any], hidden_size: int, generation_config: Any, folder: str | Path) -> None:
    """The two files of `save_thinking`, from a `record_of` the thinking, where the base model is not at hand."""
    record = thinking | {"hidden_size": hidden_size, "modules": parts_of(thinking["residual"])}
    record.pop("in_checkpoint")
    (Path(folder) / THINKING_FILE).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    generation = copy.deepcopy(generation_config)
    generation.thinking, generation.thoughts = True, thinking["thoughts"] or None
    generation._from_model_config = False  # or loading it would take its fields for a model's
    generation.save_pretrained(folder)


def save_pauses(fillers: list[int], ends: int | list[int] | None, folder: str | Path) -> None:
    """Write the forced thoughts and the end tokens of an adapter that does not think, for `load_plain_adapter`."""
    pauses = GenerationConfig(thoughts=len(fillers), filler_token_id=fillers[0], eos_token_id=ends)
    pauses.save_pretrained(folder)


def check_same_pauses(folder: Path, wanted: int) -> None:
    """Raise `InputError` unless a run without thinking that wrote `folder` had so many forced thoughts."""
    saved: Any = GenerationConfig.from_pretrained(folder) if (folder / GENERATION_FILE).is_file() else None
    was = getattr(saved, "thoughts", None) or 0
    if was != wanted:
        raise InputError(f"{folder} was trained with --thoughts {was}, not {wanted}.")


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


def _record_at(source: str | Path, **hub: Any) -> dict[str, Any] | None:
    """How the adapter at `source`, a folder or a hub id, says that it thinks; None where it does not."""
    file = find_file(source, THINKING_FILE, **hub) if isinstance(source, (str, Path)) else None
    return read_thinking(file.parent) if file is not None else None


def check_thinking_adapter(model: Any, source: str | Path, hub: dict[str, Any] | None = None) -> None:
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
    if (found := mismatch(saved, asdict(thinking))) is not None:
        name, was, built = found
        raise InputError(
            f"{source} was trained with {name}={was!r}, and this model was built with {built!r}; load it with "
            f"hrpo_patches.load_adapter(model, folder), which builds the model as the adapter needs it."
        )


def refuse_thinking_adapter(source: str | Path) -> None:
    """Called by transformers' own `load_adapter`, which cannot build a model as an adapter needs it.

    Raises:
        InputError: the adapter thinks.
    """
    if _record_at(source) is not None:
        raise InputError(f"{source} thinks; load it with hrpo_patches.load_adapter(base, folder), which knows how.")


def check_same_thinking(
    folder: Path, residual: str | None, wanted: ThinkingConfig | None, same_thoughts: bool = True
) -> None:
    """Raise `InputError` unless what `folder` holds was trained with this residual (if given) and as `wanted`.

    With the residual given, the filler must be the same, too, and the number of forced thoughts if `same_thoughts`.
    """
    saved = read_thinking(folder)
    was = spelled(saved["residual"] if saved is not None else None)
    if residual is not None and was != residual:
        raise InputError(f"{folder} was trained with --residual {was}, not {residual}.")
    if saved is None or wanted is None:
        return
    # An adapter may be trained further with other forced thoughts.
    forced = () if residual is None else ("thoughts", "filler") if same_thoughts else ("filler",)
    variant = [name for name in about_parts() if was == wanted.residual and OPTIONS[name].part in parts_of(was)]
    if (found := mismatch(saved, asdict(wanted), ("answer_start", "span", *forced, *variant))) is not None:
        name, value, other = found
        raise InputError(f"{folder} was trained with --{name} {value!r}, not {other!r}.")
