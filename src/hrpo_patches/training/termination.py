"""Saves a run that SIGTERM ends."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

STATUS = 128 + signal.SIGTERM  # what a shell says of a process that SIGTERM has ended


class NoStepsLeft(Exception):
    """A checkpoint that is resumed has all steps of its run."""


class SaveOnTermination(TrainerCallback):
    """Upon SIGTERM, the step that is under way is finished and saved, and training stops; a second one ends at once.

    It listens within its `with` block, also where training fails. A checkpoint of the last step is not trained
    further: `NoStepsLeft` is raised when its state is loaded.

    Args:
        accelerator: the trainer's; of several processes, all end when one received the signal.

    Attributes:
        received: whether the signal has come.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator, self.received = accelerator, False
        self._before: Any = signal.SIG_DFL

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        print("SIGTERM received: the step that is under way is finished and saved.", flush=True)
        signal.signal(number, self._before)  # a second signal does what it would have done

    def __enter__(self) -> SaveOnTermination:
        self._before = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: object, **kwargs: object) -> None:
        if state.global_step and state.global_step >= state.max_steps:  # or `Trainer` would take one step more
            raise NoStepsLeft

    def on_step_end(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        if self.accelerator.num_processes > 1:
            received = torch.tensor(float(self.received), device=self.accelerator.device)
            self.received = bool(self.accelerator.reduce(received, reduction="sum"))
        if self.received:
            control.should_save = control.should_training_stop = True
