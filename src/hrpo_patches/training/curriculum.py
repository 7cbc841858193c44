"""Which stage a supervised run is at: how many steps are replaced by thoughts, and when the next one is."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hrpo_patches.training.sft_config import HRPOSFTConfig
from hrpo_thinking.errors import require

logger = logging.getLogger(__name__)


class Curriculum(TrainerCallback, ExportableState):
    """The stage of a run. It is part of every checkpoint, so that a resumed run takes the same steps.

    Args:
        args: of the run.
        last: the stage that training ends at.
        on_stage: called with a stage when it begins.

    Attributes:
        stage: c, the steps that are replaced now.
    """

    def __init__(self, args: HRPOSFTConfig, last: int, on_stage: Callable[[int], None]) -> None:
        self.args, self.last, self.on_stage = args, last, on_stage
        self.stage = last if args.advance == "once" else 0
        self.losses: list[float] = []  # of the batches of this stage
        self.best, self.waited = -1.0, 0  # the best accuracy of the last stage, and evaluations since

    def check_reachable(self, steps_per_epoch: int) -> None:
        """Raise `InputError` if training takes no step, or the last stage cannot begin before it ends."""
        args = self.args
        steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
        text = "training would take no step: there is not one batch, or num_train_epochs is 0."
        require(steps_per_epoch * steps > 0, text)
        per_stage = {
            "loss": math.ceil(args.advance_batches / args.gradient_accumulation_steps),
            "epoch": args.stage_epochs * steps_per_epoch,
            "once": 0,
        }[args.advance]
        needed = math.ceil(self.last * per_stage)
        require(
            steps > needed,
            f"the last of {self.last} stages begins after {needed} steps at the earliest (advance={args.advance}, "
            f"advance_batches={args.advance_batches}, stage_epochs={args.stage_epochs:g}), and training ends after "
            f"{steps}; train longer, or set until.",
        )

    @property
    def shape(self) -> list[int]:
        """What a checkpoint and the run that resumes it must have in common: the last stage, and k."""
        return [self.last, self.args.thoughts_per_step]

    def draw(self, step: int, batch: int) -> int:
        """The stage of one batch: today's, or an earlier one; the same whenever it is asked for.

        Args:
            step: of the optimizer.
            batch: of this step.
        """
        # Of seed, step and batch alone: a resumed run draws the same stages, and no other draw is moved.
        generator = torch.Generator().manual_seed(((self.args.seed * 1_000_003 + step) * 1_009 + batch) % 2**63)
        share, place = torch.rand(2, generator=generator).tolist()
        return int(place * self.stage) if self.stage and share < self.args.earlier else self.stage

    def add_losses(self, losses: list[float]) -> None:
        """Take the losses of a step's batches that were of this stage, and begin the next stage if it is learned."""
        self.losses = [*self.losses, *losses][-self.args.advance_batches :]
        full = len(self.losses) == self.args.advance_batches
        if self.args.advance == "loss" and full and sum(self.losses) / len(self.losses) < self.args.advance_loss:
            self._enter(self.stage + 1)

    def _enter(self, stage: int) -> None:
        stage = min(stage, self.last)
        if stage != self.stage:
            self.stage, self.losses = stage, []  # the new stage has its own losses
            self.on_stage(stage)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: object, **kwargs: object) -> None:
        callbacks: Any = state.stateful_callbacks or {}
        saved = callbacks.get(type(self).__name__) if state.global_step else None  # of a checkpoint
        if saved is not None:
            attributes = dict(saved["attributes"])
            until, per_step = shape = attributes.pop("shape")
            require(
                shape == self.shape,
                f"the checkpoint was saved with until={until} and thoughts_per_step={per_step}, not "
                f"{self.shape[0]} and {self.shape[1]}; resume with the same values.",
            )
            vars(self).update(attributes)
        self.on_stage(self.stage)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: object, **kwargs: object) -> None:
        if self.args.advance == "epoch" and state.epoch is not None and state.global_step < state.max_steps:
            # Rounded up by a hair: an epoch is a sum of steps' shares, and may be 0.9999...
            self._enter(int(state.epoch / self.args.stage_epochs + 1e-6))

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        accuracy = (metrics or {}).get("eval_accuracy")
        if accuracy is None or self.stage < self.last or not self.args.patience:
            return
        if accuracy > self.best:
            self.best, self.waited = accuracy, 0
            return
        self.waited += 1
        if self.waited >= self.args.patience:
            control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: object, **kwargs: object) -> None:
        if self.stage < self.last:
            logger.warning(
                f"training ended at stage {self.stage} of {self.last}: {self.stage} steps are thought, and the rest "
                f"is written. Train longer, or raise advance_loss (now {self.args.advance_loss:g})."
            )

    def state(self) -> dict[str, Any]:
        attributes = {name: getattr(self, name) for name in ("stage", "losses", "best", "waited")}
        return {"args": {}, "attributes": attributes | {"shape": self.shape}}
