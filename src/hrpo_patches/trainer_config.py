"""HRPOConfig: GRPOConfig with thinking; knows what a run may ask for, nothing of how it is done."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hrpo_patches.config import ThinkingConfig
from hrpo_patches.errors import InputError
from hrpo_patches.released import released

GRPOConfig: Any = released("trl.trainer.grpo_config", "GRPOConfig")


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
    lr_residual_gate: float = field(default=1e-4, metadata={"help": "Learning rate of the two gates."})
    lr_residual_Lambda: float = field(default=1e-3, metadata={"help": "Learning rate of Lambda."})
    lr_thinking_projection: float = field(default=1e-4, metadata={"help": "Learning rate of thinking_projection."})
    monitor: bool = field(
        default=True,
        metadata={"help": "Measure thinking at every log line, warn early, keep all lines in monitor.jsonl."},
    )

    def __post_init__(self) -> None:
        if self.residual == "none":
            self.residual = None
        if self.residual is not None:
            ThinkingConfig(residual=self.residual, answer_start=self.answer_start)  # type: ignore[arg-type]
            self._refuse_what_cannot_think()
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
    def learning_rates(self) -> dict[str, float]:
        """The learning rates of the thinking groups, by group name."""
        return {
            "gate": self.lr_residual_gate,
            "Lambda": self.lr_residual_Lambda,
            "projection": self.lr_thinking_projection,
        }
