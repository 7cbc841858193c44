"""Prints one line for each line of a run's log; what else the log has is in its files."""

from __future__ import annotations

import sys
import time
from datetime import timedelta

from tqdm import tqdm
from transformers import (
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

TRAINING = {
    "loss": "loss {:.4g}",
    "reward": "reward {:.3f}",
    "stage": "stage {:.0f}",
    "marker_rate": "marker {:.0%}",
    "thinking/length": "thinking {:.1f} tokens",
    "thoughts": "thoughts {:.1f}",
}
# After "eval_", or "eval_NAME_" where there are several evaluation sets.
EVALUATION = {
    "loss": "loss {:.4g}",
    "reward": "reward {:.3f}",
    "accuracy": "accuracy {:.3f}",
    "accuracy_off": "thoughts off {:.3f}",
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

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None  # step and time; None outside of training
        self._last: tuple[int, float] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self._first = self._last = (state.global_step, time.monotonic())

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, object] | None = None,
        **_: object,
    ) -> None:
        if not state.is_world_process_zero or logs is None:
            return
        title, shown = _measures(logs)
        if not shown:
            return
        if not title and self._first is not None and self._last is not None:
            now = (state.global_step, time.monotonic())
            left = (state.max_steps - state.global_step) * _pace(self._first, now)
            shown += [f"{_pace(self._last, now):.2f} s/step", f"{timedelta(seconds=round(left))} left"]
            self._last = now
        step = f"step {state.global_step}/{state.max_steps}" if state.max_steps else ""
        tqdm.write("  ".join(filter(None, [step, title, *shown])))  # beside the bars of others
        sys.stdout.flush()


def _measures(logs: dict[str, object]) -> tuple[str, list[str]]:
    """The title of a line of the log, empty for one of training, and its measures as text."""
    title, prefix, texts = "", "", TRAINING
    if "loss" not in logs:
        keys = [key for key in logs if key.startswith("eval_")]
        prefixes = [key.removesuffix(name) for key in keys for name in EVALUATION if key.endswith(f"_{name}")]
        prefix, texts = min(prefixes, key=len, default="eval_"), EVALUATION
        title = f"evaluation {prefix[len('eval_') : -1]}".rstrip()
    values = {key.removeprefix(prefix): value for key, value in logs.items() if isinstance(value, (int, float))}
    return title, [text.format(values[key]) for key, text in texts.items() if key in values]


def _pace(since: tuple[int, float], now: tuple[int, float]) -> float:
    """Seconds per step between two pairs of step and time."""
    return (now[1] - since[1]) / max(1, now[0] - since[0])
