"""Keeps a run's data in the same order when it is resumed."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerState, TrainingArguments


class DataOrder(TrainerCallback):
    """Takes a resumed run's sampler to where it was when its epoch began.

    TRL's sampler draws each epoch's order from one generator, which no checkpoint holds, so that a run that is resumed
    after its first epoch would see the first epoch's order again. The order of a run that is not resumed is TRL's.
    """

    sampler: Sampler[Any] | None = None
    drawn = 0  # orders that this process has drawn

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: object, **kwargs: object) -> None:
        self.drawn = 0

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: object, **kwargs: object) -> None:
        epoch = int((state.epoch or 0.0) + 1e-6)  # a resumed run is in the middle of one
        if self.sampler is not None and getattr(self.sampler, "generator", None) is not None:
            # An order is drawn when the iteration begins: one step into it advances the generator by an epoch.
            for _ in range(self.drawn, epoch):
                next(iter(self.sampler), None)
        self.drawn = epoch + 1
