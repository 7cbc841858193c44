"""Keeps a run's data in the same order when it is resumed; knows seeds and epochs, nothing of models."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


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
