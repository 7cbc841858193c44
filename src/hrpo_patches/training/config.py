"""HRPOConfig: GRPOConfig with thinking; knows what a run may ask for, nothing of how it is done."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from hrpo_patches.thinking.passes import Passes, check_passes
from hrpo_patches.training.released import released
from hrpo_thinking.config import ThinkingConfig
from hrpo_thinking.errors import InputError
from hrpo_thinking.parts import residual_of

Reference = Literal["base", "start"]

GRPOConfig: Any = released("trl.trainer.grpo_config", "GRPOConfig")


def read_passes(given: Any) -> Passes:
    """`replay_passes` as Python gives it or as a command line does; an `InputError` if it cannot be."""
    passes = int(given) if isinstance(given, str) and given.isdecimal() else given
    check_passes(passes)
    return passes


def check_reference(reference: str) -> None:
    """Raise `InputError` unless there is such a KL reference."""
    if reference not in get_args(Reference):
        raise InputError(f"reference has to be one of {get_args(Reference)}, not {reference!r}.")


@dataclass
class HRPOConfig(GRPOConfig):
    """TRL's `GRPOConfig` with the options of thinking.

    Raises:
        InputError: an option asks for a kind of generation that cannot think, or is out of its range.
    """

    residual: str | None = field(
        default="projection",
        metadata={"help": "What a thinking position is blended with: projection, embedding, or none for plain GRPO."},
    )
    answer_start: str = field(default="####", metadata={"help": "The text that ends the thinking."})
    replay_passes: str = field(
        default="1",
        metadata={
            "help": "Passes of the loss's replay: 1, the published gradient; k, which carries it k - 1 thoughts back; "
            "or all, the exact gradient."
        },
    )
    thoughts: int | None = field(
        default=None,
        metadata={"help": "Forced thoughts that every completion begins with; by default as many as the model's own."},
    )
    filler: str | None = field(
        default=None, metadata={"help": "Name of the token that a forced thought is; by default the model's own."}
    )
    reference: str = field(
        default="base",
        metadata={
            "help": "What the KL divergence is from: base, the base model with adapters off, not thinking; or start, "
            "the model that training began from, thinking as it does."
        },
    )
    lr_residual_gate: float = field(default=1e-4, metadata={"help": "Learning rate of the two gates."})
    lr_residual_Lambda: float = field(default=1e-3, metadata={"help": "Learning rate of Lambda."})
    lr_thinking_projection: float = field(default=1e-4, metadata={"help": "Learning rate of thinking_projection."})
    monitor: bool = field(
        default=True,
        metadata={"help": "Measure thinking at every log line, warn early, keep all lines in monitor.jsonl."},
    )

    def __post_init__(self) -> None:
        self.residual = residual_of(self.residual)
        self.replay_passes = read_passes(self.replay_passes)  # type: ignore[assignment]
        check_reference(self.reference)
        if self.residual is not None:
            given = {name: getattr(self, name) for name in ("residual", "answer_start", "thoughts", "filler")}
            ThinkingConfig.from_dict({name: value for name, value in given.items() if value is not None})
        if self.residual is not None or self.thoughts:
            self._refuse_what_cannot_think()
        if self.residual is None and (self.replay_passes != 1 or self.reference != "base"):
            raise InputError("replay_passes and reference are about thinking; they do not go with residual='none'.")
        if self.reference == "start" and self.sync_ref_model:
            raise InputError("sync_ref_model moves the reference, and reference='start' keeps it; leave one out.")
        super().__post_init__()

    def _refuse_what_cannot_think(self) -> None:
        kwargs = self.generation_kwargs if isinstance(self.generation_kwargs, dict) else {}
        refused = {
            "use_vllm=True": self.use_vllm,
            "use_transformers_continuous_batching=True": self.use_transformers_continuous_batching,
            "use_transformers_paged=True": self.use_transformers_paged,
            "cache_implementation='paged'": "paged" in (self.cache_implementation, kwargs.get("cache_implementation")),
            f"num_beams={kwargs.get('num_beams')}": (kwargs.get("num_beams") or 1) > 1,
        }
        if wrong := [option for option, given in refused.items() if given]:
            raise InputError(
                f"{wrong[0]} cannot think: its decoding hands no hidden state from step to step. Leave it out, or "
                f"train plain GRPO with residual='none'."
            )

    @property
    def passes(self) -> Passes:
        """`replay_passes`, a whole number or "all"."""
        return self.replay_passes  # type: ignore[return-value]

    @property
    def learning_rates(self) -> dict[str, float]:
        """The learning rates of the thinking groups, by group name."""
        return {
            "gate": self.lr_residual_gate,
            "Lambda": self.lr_residual_Lambda,
            "projection": self.lr_thinking_projection,
        }
