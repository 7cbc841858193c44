"""HRPOSFTConfig: TrainingArguments of supervised latent training."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from hrpo_patches.training.config import ThinkingArguments, require_least, require_steps
from hrpo_patches.training.start import STARTS, check_fits, fits
from hrpo_thinking.config import OPTIONS, ThinkingConfig
from hrpo_thinking.errors import require
from hrpo_thinking.parts import PROJECTION, parts_of

ADVANCES = ("loss", "epoch", "once")
# How a model thinks that replaces its steps by thoughts, where nothing else is asked: nothing of a filler's embedding
# is worth keeping, and what is written afterwards is written as before.
DEFAULTS: dict[str, Any] = {"span": "thoughts", "r_min": 0.01, "r_max": 0.1}
SCALE = {"residual_scale": "embedding"}  # of a projection

UNSUPPORTED = {
    "load_best_model_at_end": "losses of different stages cannot be compared",
    "restore_callback_states_from_checkpoint": "the stage is restored from every checkpoint already",
    "label_smoothing_factor": "the loss is plain cross-entropy",
}


def _option(default: object, help: str, **facts: object) -> Any:
    return field(default=default, metadata={"help": help} | facts)


@dataclass
class HRPOSFTConfig(ThinkingArguments, TrainingArguments):
    """`TrainingArguments` with the options of thinking, and how written steps become thoughts.

    Stage c replaces the first c steps of each solution by `thoughts_per_step` forced thoughts each. Training begins
    with all steps written (c = 0) and ends at `until`.

    Raises:
        InputError: an option is out of its range, or cannot be combined with another.
    """

    residual: str | None = _option(
        ThinkingConfig.residual,
        OPTIONS["residual"].help[:-1] + ", or none: the thoughts are fillers, which nothing is blended with.",
        choices=ThinkingArguments.__dataclass_fields__["residual"].metadata["choices"],
    )
    thoughts_per_step: int = _option(1, "Forced thoughts that replace a step.")
    until: int | None = _option(
        None, "Steps that are replaced at the last stage, the rest stays written; by default the most of any solution."
    )
    advance: str = _option(
        "loss",
        "When the next step is replaced: loss, when the last is learned; epoch, every --stage_epochs; once, at once.",
        choices=ADVANCES,
    )
    advance_loss: float = _option(
        0.3,
        "A stage is learned when its mean loss, in nats per token, is below this: of each batch the larger one of the "
        "loss over all that is written and that over what directly follows the thoughts (a step, or the answer).",
    )
    advance_batches: int = _option(25, "Batches of a stage over which its mean loss is taken.")
    stage_epochs: float = _option(1.0, "Epochs of a stage with --advance epoch.")
    earlier: float = _option(0.5, "Share of batches that are of an earlier stage, drawn evenly.")
    projection_start: str | None = _option(
        None,
        "Where the projection starts: lstsq, least squares from states to the embeddings of what they predict, on the "
        "data's own steps; or random. Default: lstsq where there is a projection of one layer.",
        choices=STARTS,
    )
    gate: float = _option(2.0, "Start of the bias of the gate i: sigmoid(2) = 0.88 of the residual is let through.")
    max_completion_length: int = _option(512, "Tokens, thoughts included, of a completion; longer ones are refused.")
    patience: int = _option(
        0, "Evaluations of the last stage without a better accuracy after which training ends; 0: never."
    )

    def __post_init__(self) -> None:
        # Before the options are read: those in a dict go over these defaults; a ThinkingConfig is complete.
        if self.residual not in (None, "none"):
            projected = PROJECTION in parts_of(str(self.residual))
            own = DEFAULTS | (SCALE if projected else {})
            if isinstance(self.thinking, dict) or self.thinking is None:
                self.thinking = own | (self.thinking or {})
        self.read_thinking()
        super().__post_init__()
        self.remove_unused_columns = False  # a row is the number of a lesson
        sizes = ("max_completion_length", "per_device_eval_batch_size")
        require_least(self, 1, "thoughts_per_step", "advance_batches", *sizes)
        require_least(self, 0, "patience", *(["until"] if self.until is not None else []))
        require_steps(self)
        for name, values in {"advance": ADVANCES, "projection_start": (*STARTS, None)}.items():
            value = getattr(self, name)
            require(value in values, f"{name} must be one of {values}, not {value!r}.")
        for name, why in UNSUPPORTED.items():
            require(not getattr(self, name), f"{name}={getattr(self, name)} is not supported: {why}; remove it.")
        require(0 <= self.earlier < 1, f"earlier must be from 0 to below 1, not {self.earlier}.")
        text = f"advance_loss must be a number above 0, not {self.advance_loss}."
        require(0 < self.advance_loss < math.inf, text)
        require(self.eval_steps is None or self.eval_steps > 0, f"eval_steps must be above 0, not {self.eval_steps}.")
        require(self.stage_epochs > 0, f"stage_epochs must be above 0, not {self.stage_epochs}.")
        text = "bptt is about thinking; it cannot be combined with residual='none'."
        require(self.residual is not None or not self.bptt, text)
        require(self.thoughts is None, "thoughts follows from thoughts_per_step and the stage; remove it.")
        self.check_start()

    def check_start(self) -> None:
        """Raise `InputError` if least squares are asked for without a single linear layer to fit."""
        if self.projection_start == "lstsq":
            check_fits(self.residual, *self._shape)

    @property
    def _shape(self) -> tuple[int, bool]:
        options: dict[str, Any] = self.thinking or {}  # type: ignore[assignment]
        return options.get("projection_layers", 1), options.get("projection_norm", False)

    @property
    def start(self) -> str:
        """Where the projection starts, one of `STARTS`."""
        return self.projection_start or ("lstsq" if fits(self.residual, *self._shape) else "random")
