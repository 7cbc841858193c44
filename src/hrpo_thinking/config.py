"""ThinkingConfig: how a model thinks; knows values and their ranges, nothing of tensors."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from hrpo_thinking.errors import InputError
from hrpo_thinking.parts import PROJECTION, RESIDUALS, parts_of

Scale = Literal["unit", "embedding"]


@dataclass
class ThinkingConfig:
    """How a model thinks; kept as a dict at `model.config.thinking`. A model without one there is plain.

    Attributes:
        residual: what a position is blended with. "projection": the L2-normalised projection of the state that its
            token was sampled from. "embedding": the expected input embedding (the original HRPO).
        answer_start: the text that ends the thinking.
        filler: the name of an existing token, which stands for a forced thought.
        thoughts: how many forced thoughts every completion begins with.
        r_min, r_max: the range that the decay at a fully open gate starts in, 0 < r_min < r_max < 1.
        init_std: the standard deviation of the projection's initial weights. It sets no scale, for the residual is
            normalised; the start is smooth because r_min is near 1.
        projection_layers: 1, one linear layer, as published; 2, two of them with SiLU between.
        projection_hidden: the width between two layers; by default the hidden size.
        projection_norm: whether a LayerNorm follows the projection.
        projection_dropout: the share of the projected vector that is dropped in a training forward, and only there: a
            rollout, and the log-probabilities of a forward without gradients, see none.
        residual_scale: the norm of the projected residual. "unit": 1; "embedding": that of the mean input embedding.
        embedding_norm: that norm, the mean over the vocabulary, once it has been measured.
        in_checkpoint: set by `save_pretrained`; a checkpoint that says so and lacks a thinking weight does not load.

    Raises:
        InputError: a value is out of its range.
    """

    residual: str = "projection"
    answer_start: str = "####"
    filler: str = "."
    thoughts: int = 0
    r_min: float = 0.99
    r_max: float = 0.999
    init_std: float = 0.001
    projection_layers: int = 1
    projection_hidden: int | None = None
    projection_norm: bool = False
    projection_dropout: float = 0.0
    residual_scale: Scale = "unit"
    embedding_norm: float | None = None
    in_checkpoint: bool = False

    def __post_init__(self) -> None:
        if self.residual not in RESIDUALS:
            raise InputError(f"residual has to be one of {tuple(RESIDUALS)}, not {self.residual!r}.")
        if not isinstance(self.answer_start, str) or not self.answer_start:
            raise InputError(f"answer_start has to be a non-empty text, not {self.answer_start!r}.")
        if not isinstance(self.filler, str) or not self.filler:
            raise InputError(f"filler has to be the name of a token, not {self.filler!r}.")
        for name in ("r_min", "r_max", "init_std", "projection_dropout", "embedding_norm"):
            _check_number(name, getattr(self, name), whole=False)
        for name in ("thoughts", "projection_layers", "projection_hidden"):
            _check_number(name, getattr(self, name), whole=True)
        if self.thoughts < 0:
            raise InputError(f"thoughts has to be 0 or more, not {self.thoughts!r}.")
        check_r_range(self.r_min, self.r_max)
        if not self.init_std > 0:
            raise InputError(f"init_std has to be above 0, not {self.init_std!r}.")
        self._check_projection()

    def _check_projection(self) -> None:
        if self.projection_layers not in (1, 2):
            raise InputError(f"projection_layers has to be 1 or 2, not {self.projection_layers!r}.")
        if self.projection_hidden is not None and self.projection_layers == 1:
            raise InputError("projection_hidden is the width between two layers; it needs projection_layers=2.")
        if self.projection_hidden is not None and not self.projection_hidden > 0:
            raise InputError(f"projection_hidden has to be above 0, not {self.projection_hidden!r}.")
        if not isinstance(self.projection_norm, bool):
            raise InputError(f"projection_norm has to be True or False, not {self.projection_norm!r}.")
        if not 0 <= self.projection_dropout < 1:
            raise InputError(f"projection_dropout has to be from 0 to below 1, not {self.projection_dropout!r}.")
        if self.residual_scale not in get_args(Scale):
            raise InputError(f"residual_scale has to be one of {get_args(Scale)}, not {self.residual_scale!r}.")
        if self.embedding_norm is not None and not self.embedding_norm > 0:
            raise InputError(f"embedding_norm has to be above 0, not {self.embedding_norm!r}.")
        if PROJECTION not in parts_of(self.residual) and (used := [name for name in VARIANT if self._differs(name)]):
            raise InputError(
                f"{used[0]} is about the projection; it does not go with residual={self.residual!r}, leave it out."
            )

    def _differs(self, name: str) -> bool:
        return bool(getattr(self, name) != getattr(type(self), name))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ThinkingConfig:
        """The config with these values; an unknown key is an `InputError`."""
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise InputError(f"unknown thinking option {unknown[0]!r}; there are {known}.")
        return cls(**values)

    @classmethod
    def of(cls, model_config: Any) -> ThinkingConfig | None:
        """The thinking config of a model's config: the defaults for `True` and `{}`, None for None and `False`."""
        value = getattr(model_config, "thinking", None)
        if value is None or value is False:
            return None
        if value is True:
            return cls()
        if isinstance(value, cls):
            return value
        if isinstance(value, dict):
            return cls.from_dict(value)
        raise InputError(f"config.thinking has to be a dict, a ThinkingConfig, True, False or None, not {value!r}.")

    def to_dict(self) -> dict[str, Any]:
        """The values as a dict, as they are saved in `config.json`."""
        return asdict(self)


VARIANT = ("projection_layers", "projection_hidden", "projection_norm", "projection_dropout", "residual_scale")


NEEDS_US = " (needs: import hrpo_patches)"  # after a merged model's type; stock transformers prints it when it refuses


def plain_model_type(model_config: dict[str, Any]) -> dict[str, Any]:
    """Called by `PreTrainedConfig.get_config_dict`: a merged model's config with the model type that it stands for."""
    if str(model_config.get("model_type", "")).endswith(NEEDS_US):
        return model_config | {"model_type": model_config["model_type"].removesuffix(NEEDS_US)}
    return model_config


def _check_number(name: str, value: Any, whole: bool) -> None:
    if value is None and getattr(ThinkingConfig, name) is None:
        return
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not abs(value) < math.inf:
        raise InputError(f"{name} has to be a {'whole' if whole else 'finite'} number, not {value!r}.")


def check_r_range(r_min: float, r_max: float) -> None:
    """Raise `InputError` unless 0 < r_min < r_max < 1."""
    if not 0 < r_min < r_max < 1:
        raise InputError(f"the decay range needs 0 < r_min < r_max < 1, not r_min={r_min} and r_max={r_max}.")


def check_same_kind(saved: dict[str, Any], wanted: dict[str, Any], what: str) -> None:
    """Raise `InputError` if thinking weights that were `saved` with one residual or marker are wanted with another."""
    for key in ("residual", "answer_start", *VARIANT):
        was = saved.get(key, getattr(ThinkingConfig, key))
        if saved.get("in_checkpoint") and key in wanted and was != wanted[key]:
            raise InputError(f"the thinking weights of {what} were trained with {key}={was!r}, not {wanted[key]!r}.")
