"""ThinkingConfig: how a model thinks. Each option is written here once, with its help and what it may be.

Command lines, `HRPOConfig`, adapters' records and the table in docs/options.md are derived from its fields. Knows
values and their ranges, nothing of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from typing import Any, NamedTuple

from hrpo_thinking.errors import InputError
from hrpo_thinking.parts import PROJECTION, RESIDUALS, parts_of


class Option(NamedTuple):
    """What an option may be.

    Attributes:
        help: what it is, for a command line.
        kind: the type of its values.
        optional: whether it may be None.
        choices: the values that there are, where they can be counted.
        low, above, below: the least value, or what all values are above and below.
        part: the thinking module that it is about; no run without that module may set it.
        shapes: whether weights depend on it, in number or in shape.
        published: its name in the published HRPO scripts, where that is another.
    """

    help: str
    kind: type
    optional: bool = False
    choices: Collection[Any] | None = None
    low: float = -math.inf
    above: float = -math.inf
    below: float = math.inf
    part: str | None = None
    shapes: bool = False
    published: str | None = None

    def check(self, name: str, value: Any) -> None:
        """Raise an `InputError` that says what `name` must be, unless it may be `value`."""
        if value is None and self.optional:
            return
        kinds = (int, float) if self.kind is float else (self.kind,)
        fits = isinstance(value, kinds) and (self.kind is bool or not isinstance(value, bool))
        if not fits or (self.kind is float and not math.isfinite(value)) or value == "":
            raise InputError(f"{name} must be {_NOUNS[self.kind]}, not {value!r}.")
        if self.choices is not None and value not in self.choices:
            raise InputError(f"{name} must be one of {tuple(self.choices)}, not {value!r}.")
        if self.kind in (int, float) and not (max(self.low, self.above) <= value < self.below and value != self.above):
            bounds = [
                f"{self.low:g} or more" if self.low > -math.inf else "",
                f"above {self.above:g}" if self.above > -math.inf else "",
                f"below {self.below:g}" if self.below < math.inf else "",
            ]
            raise InputError(f"{name} must be {' and '.join(filter(None, bounds))}, not {value!r}.")


_NOUNS = {str: "a non-empty text", bool: "True or False", int: "a whole number", float: "a finite number"}


def _option(default: object, help: str, kind: type | None = None, **facts: Any) -> Any:
    option = Option(help, kind or type(default), default is None, **facts)
    return field(default=default, metadata={"option": option})


@dataclass
class ThinkingConfig:
    """How a model thinks. A model's `config.thinking` holds it as a dict (`record_of`); a model without one is plain.

    Attributes:
        residual: what a position is blended with. "projection": the L2-normalised projection of the state that its
            token was sampled from. "embedding": the expected input embedding (the original HRPO).
        answer_start: the text that ends the thinking.
        filler: the name of an existing token, which stands for a forced thought.
        thoughts: how many forced thoughts every completion begins with.
        span: which tokens of a completion think. "marker": all until the answer marker; "thoughts": the forced
            thoughts alone, after which the model writes as a plain one.
        r_min, r_max: the range that the decay at a fully open gate starts in, 0 < r_min < r_max < 1.
        init_std: the standard deviation of the projection's initial weights. It sets no scale because the residual is
            normalised; the start is smooth because r_min is near 1.
        projection_layers: 1, one linear layer, as published; 2, two of them with SiLU between.
        projection_hidden: the width between two layers; by default the hidden size.
        projection_norm: whether a LayerNorm follows the projection.
        projection_dropout: the share of the projected vector that is dropped in a training forward, and only there: a
            rollout, and the log-probabilities of a forward without gradients, see none.
        residual_scale: the norm of the projected residual. "unit": 1; "embedding": that of the mean input embedding.

    Raises:
        InputError: a value is out of its range.
    """

    residual: str = _option(
        "projection", "What a thinking position is blended with: projection or embedding.", choices=RESIDUALS
    )
    answer_start: str = _option("####", "The text that ends the thinking and starts the answer.")
    filler: str = _option(".", "Name of the existing token that a forced thought is.")
    thoughts: int = _option(0, "Forced thoughts that every completion begins with.", low=0)
    span: str = _option(
        "marker",
        "Which tokens think: marker, all until the answer marker; thoughts, the forced thoughts alone.",
        choices=("marker", "thoughts"),
    )
    r_min: float = _option(0.99, "Lower end of the initial decay.", published="residual_r_min")
    r_max: float = _option(0.999, "Upper end of the initial decay.", published="residual_r_max")
    init_std: float = _option(
        0.001, "Standard deviation of the projection's initial weights; it sets no scale.", above=0
    )
    projection_layers: int = _option(
        1, "Linear layers of the projection: 1, or 2 with SiLU between.", choices=(1, 2), part=PROJECTION, shapes=True
    )
    projection_hidden: int | None = _option(
        None, "Width between two layers; by default the hidden size.", int, above=0, part=PROJECTION, shapes=True
    )
    projection_norm: bool = _option(False, "A LayerNorm after the projection.", part=PROJECTION, shapes=True)
    projection_dropout: float = _option(
        0.0, "Dropout of the projected vector, in the loss only.", low=0, below=1, part=PROJECTION
    )
    residual_scale: str = _option(
        "unit",
        "Norm of the residual: unit, or embedding for that of the mean embedding.",
        choices=("unit", "embedding"),
        part=PROJECTION,
    )

    def __post_init__(self) -> None:
        for name, option in OPTIONS.items():
            option.check(name, getattr(self, name))
        check_r_range(self.r_min, self.r_max)
        if self.projection_hidden is not None and self.projection_layers == 1:
            raise InputError("projection_hidden is the width between two layers; it needs projection_layers=2.")
        lacking = [name for name in about_parts() if OPTIONS[name].part not in parts_of(self.residual)]
        if used := [name for name in lacking if getattr(self, name) != getattr(ThinkingConfig, name)]:
            raise InputError(
                f"{used[0]} is about the projection; it cannot be combined with residual={self.residual!r}, remove it."
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ThinkingConfig:
        """The config with these values, as a model or a file holds them; an unknown key is an `InputError`."""
        if unknown := sorted(set(values) - {*OPTIONS, *RECORD}):
            raise InputError(f"unknown thinking option {unknown[0]!r}; there are {list(OPTIONS)}.")
        _NORM.check("embedding_norm", values.get("embedding_norm"))
        return cls(**{name: value for name, value in values.items() if name in OPTIONS})

    @classmethod
    def of(cls, model_config: object) -> ThinkingConfig | None:
        """The thinking config of a model's config: the defaults for `True` and `{}`, None for None and `False`.

        None also for a value that is somebody else's: no dict, or one in which no key is or resembles an option.
        """
        value = getattr(model_config, "thinking", None)
        if value is None or value is False or _is_strangers(value):
            return None
        if value is True:
            return cls()
        if isinstance(value, cls):
            return value
        return cls.from_dict(value)

    def chosen(self) -> dict[str, Any]:
        """The options, without forced thoughts that have their default value: a saved model may have its own."""
        left_open = [name for name in FORCED if getattr(self, name) == getattr(ThinkingConfig, name)]
        return {name: value for name, value in asdict(self).items() if name not in left_open}

    def to_dict(self) -> dict[str, Any]:
        """The options as `config.thinking` holds them: the record of a model that nothing has been measured of."""
        return record_of(self)


FORCED = ("thoughts", "filler")
OPTIONS: dict[str, Option] = {one.name: one.metadata["option"] for one in fields(ThinkingConfig)}

# What `config.thinking` holds beside the options: the mean norm of the input embeddings, once it has been measured;
# that a checkpoint holds thinking weights, so that one without does not load, which is set in the written file only.
RECORD: dict[str, Any] = {"embedding_norm": None, "in_checkpoint": False}
_NORM = Option("", float, optional=True, above=0)


def _is_strangers(value: object) -> bool:
    """Whether a config's `thinking` is another library's, which means something else by the word."""
    if not isinstance(value, dict):
        return not isinstance(value, (bool, ThinkingConfig))
    return bool(value) and not any(get_close_matches(str(name), [*OPTIONS, *RECORD]) for name in value)


def record_of(thinking: ThinkingConfig, held: object = None) -> dict[str, Any]:
    """What `config.thinking` holds for `thinking`; the fields of `RECORD` are taken from `held`."""
    before = held if isinstance(held, dict) else {}
    return asdict(thinking) | {name: before.get(name, value) for name, value in RECORD.items()}


def scaled_to_embeddings(thinking: dict[str, Any]) -> bool:
    """Whether a record's projected residual is as long as the mean embedding, whose norm then must be measured."""
    return thinking.get("residual_scale") == "embedding"


def about_parts() -> list[str]:
    """The options that are about a thinking module: what was trained with one value is not to be used with another."""
    return [name for name, option in OPTIONS.items() if option.part is not None]


NEEDS_US = " (needs: import hrpo_patches)"  # after a merged model's type; stock transformers prints it when it refuses


def plain_model_type(model_config: dict[str, Any]) -> dict[str, Any]:
    """Called by `PreTrainedConfig.get_config_dict`: a merged model's config with the model type that it stands for."""
    if str(model_config.get("model_type", "")).endswith(NEEDS_US):
        return model_config | {"model_type": model_config["model_type"].removesuffix(NEEDS_US)}
    return model_config


def keep_thinking_options(generation_config: Any, given: dict[str, Any]) -> None:
    """Called by `GenerationConfig.__init__`: moves the fields of thinking out of `given`; a missing one is None."""
    for name in ("thinking", "thoughts", "filler_token_id"):
        value = given.pop(name, None)
        if value is not None:
            setattr(generation_config, name, value)


def check_r_range(r_min: float, r_max: float) -> None:
    """Raise `InputError` unless 0 < r_min < r_max < 1."""
    if not 0 < r_min < r_max < 1:
        raise InputError(f"the decay range needs 0 < r_min < r_max < 1, not r_min={r_min} and r_max={r_max}.")


# What thinking weights depend on: trained with one value, they cannot be used with another.
KIND = ("residual", "answer_start", "span", *about_parts())


def mismatch(
    saved: dict[str, Any], wanted: dict[str, Any], names: Iterable[str] = KIND
) -> tuple[str, Any, Any] | None:
    """The first option whose value in a record is not the one that is wanted: (name, saved value, wanted value).

    Args:
        saved: a record; an option that it lacks has its default.
        wanted: options; one that it lacks is not compared.
        names: the options to compare.
    """
    for name in names:
        was = saved.get(name, getattr(ThinkingConfig, name))
        if name in wanted and was != wanted[name]:
            return name, was, wanted[name]
    return None


def check_same_kind(saved: dict[str, Any], wanted: dict[str, Any], what: str) -> None:
    """Raise `InputError` if the thinking weights of a checkpoint are of another kind than is wanted."""
    if saved.get("in_checkpoint") and (found := mismatch(saved, wanted)) is not None:
        name, was, new = found
        raise InputError(f"the thinking weights of {what} were trained with {name}={was!r}, not {new!r}.")
