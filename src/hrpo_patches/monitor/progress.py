"""Prints one line for each line of a run's log; what else the log has is in its files."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any

from tqdm import tqdm
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerState

TRAINING = {
    "loss": "loss {:.4g}",
    "reward": "reward {:.3f}",
    "stage": "stage {:.0f}",
    "marker_rate": "marker {:.0%}",
    "thinking/length": "thinking {:.1f} tokens",
    "thoughts": "thoughts {:.1f}",
}
EVALUATION = {
    "eval_loss": "loss {:.4g}",
    "eval_reward": "reward {:.3f}",
    "eval_accuracy": "accuracy {:.3f}",
    "eval_accuracy_off": "thoughts off {:.3f}",
}


class ProgressLines(TrainerCallback):
    """Prints step, loss, reward or stage, marker rate, thoughts, seconds per step and the time left, as plain text.

    Lengths of thinking are in tokens. Seconds per step are the mean since the line before, and include evaluations
    and saves. The time left is that of as many steps at the mean pace of this process.
    """

    @classmethod
    def replace_bar(cls, trainer: Trainer) -> None:
        """Print lines instead of transformers' bar; with `disable_tqdm`, transformers still prints all of the log."""
        if trainer.pop_callback(ProgressCallback) is not None:
            trainer.add_callback(cls())

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._first = self._last = (state.global_step, time.monotonic())

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or logs is None:
            return
        training = "loss" in logs
        shown = [text.format(logs[key]) for key, text in (TRAINING if training else EVALUATION).items() if key in logs]
        if not shown:
            return
        now = (state.global_step, time.monotonic())
        if training:
            left = (state.max_steps - state.global_step) * _pace(self._first, now)
            shown += [f"{_pace(self._last, now):.2f} s/step", f"{timedelta(seconds=round(left))} left"]
            self._last = now
        else:
            shown.insert(0, "evaluation")
        tqdm.write("  ".join([f"step {state.global_step}/{state.max_steps}", *shown]))  # beside the bars of others
        sys.stdout.flush()


def _pace(since: tuple[int, float], now: tuple[int, float]) -> float:
    """Seconds per step between two pairs of step and time."""
    return (now[1] - since[1]) / max(1, now[0] - since[0])
