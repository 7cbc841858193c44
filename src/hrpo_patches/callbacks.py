"""Watches a run for a marker that never comes, and keeps its data in order; knows counts, nothing of models."""

from __future__ import annotations

import logging
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

PATIENCE = 20  # optimizer steps


class EpochOrder(TrainerCallback):
    """Draws each epoch's order of the data from the seed and the epoch alone.

    TRL's sampler goes on from epoch to epoch with one generator that no checkpoint holds, so a run that is resumed
    after its first epoch would see the first epoch's order again. The first epoch is TRL's.
    """

    sampler: Any = None

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        epoch = int((state.epoch or 0.0) + 1e-6)  # a resumed run is in the middle of one
        if getattr(self.sampler, "generator", None) is not None:
            self.sampler.generator.manual_seed(args.seed + epoch)


class MarkerWarning(TrainerCallback):
    """Says once, after the first 20 steps, that no completion carried the answer marker, and what to try."""

    def __init__(self, args: Any) -> None:
        self.marker = args.answer_start
        self.max_completion_length = args.max_completion_length
        self.seen = 0
        self.steps = 0

    def count(self, marked: int) -> None:
        """Take the number of a batch's completions that carry the marker."""
        self.seen += marked

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.steps += 1
        if self.steps == PATIENCE and not self.seen and state.is_world_process_zero:
            logger.warning(
                "No completion of the first %d steps carries the answer marker %r, so every reward is 0 and nothing "
                "is learned. Show the marker in the prompt (a worked example that ends in '%s 42' helps most), raise "
                "max_completion_length (completions are cut at %d tokens), or start from an instruction-tuned model.",
                PATIENCE,
                self.marker,
                self.marker,
                self.max_completion_length,
            )
