"""ThinkingConfig: how a model thinks; knows values and their ranges, nothing of tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from hrpo_patches.errors import InputError

Residual = Literal["projection", "embedding"]


@dataclass
class ThinkingConfig:
    """How a model thinks; kept as a dict at `model.config.thinking` (`False` there builds a model without thinking).

    Attributes:
        residual: what a position is blended with. "projection": the L2-normalised projection of the state that its
            token was sampled from. "embedding": the expected input embedding (the original HRPO).
        answer_start: the text that ends the thinking.
        r_min, r_max: the range that the decay at a fully open gate starts in, 0 < r_min < r_max < 1.
        init_std: the standard deviation of the projection's initial weights. It sets no scale, for the residual is
            normalised; the start is smooth because r_min is near 1.
        in_checkpoint: set by `save_pretrained`; a checkpoint that says so and lacks a thinking weight does not load.

    Raises:
        InputError: a value is out of its range.
    """

    residual: Residual = "projection"
    answer_start: str = "####"
    r_min: float = 0.99
    r_max: float = 0.999
    init_std: float = 0.001
    in_checkpoint: bool = False

    def __post_init__(self) -> None:
        if self.residual not in get_args(Residual):
            raise InputError(f"residual has to be one of {get_args(Residual)}, not {self.residual!r}.")
        if not isinstance(self.answer_start, str) or not self.answer_start:
            raise InputError(f"answer_start has to be a non-empty text, not {self.answer_start!r}.")
        check_r_range(self.r_min, self.r_max)
        if not self.init_std > 0:
            raise InputError(f"init_std has to be above 0, not {self.init_std!r}.")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ThinkingConfig:
        """The config with these values; an unknown key is an `InputError`."""
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise InputError(f"unknown thinking option {unknown[0]!r}; there are {known}.")
        return cls(**values)

    @classmethod
    def of(cls, model_config: Any) -> ThinkingConfig | None:
        """The thinking config of a model's config: the defaults where it says nothing, None where it says False."""
        value = getattr(model_config, "thinking", None)
        if value is False:
            return None
        if value is None or value is True:
            return cls()
        if isinstance(value, cls):
            return value
        if isinstance(value, dict):
            return cls.from_dict(value)
        raise InputError(f"config.thinking has to be a dict, a ThinkingConfig or False, not {value!r}.")

    def to_dict(self) -> dict[str, Any]:
        """The values as a dict, as they are saved in `config.json`."""
        return asdict(self)


def check_r_range(r_min: float, r_max: float) -> None:
    """Raise `InputError` unless 0 < r_min < r_max < 1."""
    if not 0 < r_min < r_max < 1:
        raise InputError(f"the decay range needs 0 < r_min < r_max < 1, not r_min={r_min} and r_max={r_max}.")


def check_same_kind(saved: dict[str, Any], wanted: dict[str, Any], what: str) -> None:
    """Raise `InputError` if thinking weights that were `saved` with one residual or marker are wanted with another."""
    for key in ("residual", "answer_start"):
        if saved.get("in_checkpoint") and key in wanted and saved[key] != wanted[key]:
            raise InputError(
                f"the thinking weights of {what} were trained with {key}={saved[key]!r}, not {wanted[key]!r}."
            )
