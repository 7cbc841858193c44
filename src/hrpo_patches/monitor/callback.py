"""Watches a run that thinks: measures, warns, stops before a step that is not finite; leaves the maths to others.

What it measures is rank 0's first batch of each logged step, seen through a hook on the model's backbone that comes
off again. It draws no random numbers, so that a run goes the same way with it and without.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hrpo_patches.monitor.early_warnings import EarlyWarnings
from hrpo_patches.monitor.log import RunLog
from hrpo_patches.monitor.measures import (
    gradient_norms,
    marker_rate,
    measure_blend,
    measure_weights,
    projection_weights,
)
from hrpo_patches.monitor.nonfinite import refuse_nonfinite, refuse_spoilt
from hrpo_patches.thinking.backbone import causal_lm
from hrpo_patches.thinking.shards import head_of, in_units, partitioned, whole
from hrpo_thinking.config import ThinkingConfig
from hrpo_thinking.errors import InputError, NonFiniteError
from hrpo_thinking.parts import is_thinking_parameter, spelled

logger = logging.getLogger(__name__)

START_FILE = "monitor_start.safetensors"  # the projection as the run found it


def monitor_thinking(trainer: Trainer) -> ThinkingMonitor:
    """Let a monitor watch any Hugging Face `Trainer`; `HRPOTrainer` has one unless its config says `monitor=False`.

    Call it before `trainer.train()`. Its measures join the trainer's log lines, and with them go to `report_to`.

    Returns:
        The monitor, which is among the trainer's callbacks.

    Raises:
        InputError: the trainer's model has no trainable thinking weights, or it has a monitor already.
    """
    if any(isinstance(callback, ThinkingMonitor) for callback in trainer.callback_handler.callbacks):
        raise InputError("this trainer has a monitor already.")
    monitor = ThinkingMonitor(trainer.accelerator.unwrap_model(trainer.model), trainer.args)
    if not monitor.thinks:
        raise InputError(
            "the trainer's model has no trainable thinking weights; with PEFT, name the thinking modules in "
            "LoraConfig(modules_to_save=...), or use HRPOTrainer, which does."
        )
    return monitor.first_in(trainer)


class ThinkingMonitor(TrainerCallback):
    """Adds what it measures to every log line, and keeps all lines in `output_dir/monitor.jsonl`.

    Args:
        model: of the trainer, unwrapped.
        args: of the trainer.
        estimate_marker: whether to log a `marker_rate`, from the batch that is measured.

    Attributes:
        said: the early warnings so far.
        seconds: what the monitor has cost.
    """

    def __init__(self, model: nn.Module, args: TrainingArguments, estimate_marker: bool = True) -> None:
        base = causal_lm(model)
        self.model = model
        self.backbone: Any = getattr(base, "base_model", base)
        self.base = base
        self.thinks = any(is_thinking_parameter(n) and p.requires_grad for n, p in model.named_parameters())
        self.start = {n: p.clone() for n, p in projection_weights(self.backbone).items()} if self.thinks else {}
        self.estimate_marker = estimate_marker
        self.log = RunLog(Path(str(args.output_dir)))
        self.said: list[str] = []
        self.seconds = 0.0
        self._sampling = False
        self._inputs: dict[str, Any] = {}  # of the last forward that wanted a gradient
        self._first: dict[str, Any] | None = None  # of the first one in a step that is sampled
        self._values: dict[str, float] = {}
        self._warnings: EarlyWarnings | None = None  # until training begins

    def first_in(self, trainer: Trainer) -> ThinkingMonitor:
        """Join a trainer's callbacks, before those that report: they are handed one log line, in turn."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        thinking = ThinkingConfig.of(self.backbone.config) if self.thinks else None
        marker = getattr(args, "answer_start", (thinking or ThinkingConfig()).answer_start)
        self._warnings = EarlyWarnings(marker, getattr(args, "max_completion_length", None), state.global_step)
        self._began = time.perf_counter()
        if state.is_world_process_zero:
            self.log.begin(
                state.global_step,
                {"residual": spelled(thinking.residual if thinking is not None else None)},
                state.log_history,
            )
            self._find_start(state.global_step)
        self._unhook()  # of a training that failed, of any trainer
        self.backbone._monitor_hook = self.backbone.register_forward_pre_hook(self._see, with_kwargs=True)

    def _find_start(self, step: int) -> None:
        """Keep the weights that drift is measured from, or find those of the run that is resumed."""
        file = self.log.path.with_name(START_FILE)
        if step == 0 and self.start:
            save_file({name: weight.cpu().contiguous() for name, weight in self.start.items()}, file)
        elif step:
            self.start = load_file(file) if file.is_file() else {}

    def _see(self, module: nn.Module, args: tuple[object, ...], inputs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            self._inputs = inputs
            if self._sampling and self._first is None:
                self._first = inputs

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self._inputs, self._first = {}, None
        step, every = state.global_step + 1, max(1, int(state.logging_steps or 1))
        if args.logging_strategy == "epoch":
            every = max(1, math.ceil(state.max_steps / max(1, state.num_train_epochs)))
        logged = args.logging_strategy != "no" and (step % every == 0 or (args.logging_first_step and step == 1))
        asked = (state.is_world_process_zero or in_units(self.model)) and not partitioned(self.model)
        self._sampling = bool(logged and self.thinks and asked)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        started = time.perf_counter()
        self._refuse_nonfinite(args, state)
        self.seconds += time.perf_counter() - started

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        started = time.perf_counter()
        self._refuse_nonfinite(args, state)
        if self._sampling:
            values = gradient_norms(self.model)
            with whole(self.model):
                values |= self._measured(getattr(args, "temperature", 1.0))
            self._values = _numbers(values)
        self.seconds += time.perf_counter() - started

    def _measured(self, temperature: float) -> dict[str, Tensor]:
        values = measure_weights(self.backbone, self.start)
        if self._first is not None and self._first.get("thinking_inputs") is not None:
            values |= {"marker_rate": marker_rate(self._first)} if self.estimate_marker else {}
            values |= measure_blend(self.backbone, head_of(self.base), self._first, temperature)
        return values

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        started = time.perf_counter()
        self._check(refuse_spoilt, args, state, state.global_step)
        self.seconds += time.perf_counter() - started

    def _refuse_nonfinite(self, args: TrainingArguments, state: TrainerState) -> None:
        if not args.fp16:  # whose scaler tries steps that overflow, and passes them over
            self._check(refuse_nonfinite, args, state, state.global_step + 1)

    def _check(self, refuse: Callable[..., None], args: TrainingArguments, state: TrainerState, step: int) -> None:
        """Do a check that may stop the run, and let the log say so."""
        try:
            refuse(self.model, self._inputs, self.log.path.parent, step, args.process_index)
        except NonFiniteError as error:
            if state.is_world_process_zero:
                self.log.write({"step": state.global_step, "stopped": str(error)})
            raise

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: object,
    ) -> None:
        if logs is None or self._warnings is None or not state.is_world_process_zero:
            return
        started = time.perf_counter()
        if "loss" in logs:
            added = {name: value for name, value in _before_clipping(self._values, logs).items() if name not in logs}
            logs |= added
            state.log_history[-1] |= added
            self._values = {}
        row = {"step": state.global_step} | logs
        if new := self._warnings.read(row):
            row["warnings"] = new
            self.said += new
            for text in new:
                logger.warning(text)
        self.log.write(row)
        self.seconds += time.perf_counter() - started

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self._unhook()
        if state.is_world_process_zero:
            whole = time.perf_counter() - self._began
            cost = {"monitor_seconds": round(self.seconds, 3), "train_seconds": round(whole, 3)}
            self.log.write({"step": state.global_step} | cost)
            share = self.seconds / whole
            logger.info(f"monitor: {self.seconds:.1f} s of {whole:.0f} s of training ({share:.2%}), {self.log.path}")

    def _unhook(self) -> None:
        hook = getattr(self.backbone, "_monitor_hook", None)
        if hook is not None:
            hook.remove()
            self.backbone._monitor_hook = None


def _numbers(values: dict[str, Tensor]) -> dict[str, float]:
    """All of them with one transfer from the device."""
    device = next(iter(values.values())).device
    numbers = torch.stack([value.detach().float().to(device) for value in values.values()]).tolist()
    return dict(zip(values, numbers, strict=True))


def _before_clipping(values: dict[str, float], logs: dict[str, Any]) -> dict[str, float]:
    """The gradient norms as they were: a callback sees them clipped, and the log has the norm of all before."""
    norms = {name: value for name, value in values.items() if name.endswith("/grad_norm")}
    clipped = sum(value**2 for value in norms.values()) ** 0.5
    scale = logs.get("grad_norm", clipped) / clipped if clipped else 1.0
    return values | {name: value * scale for name, value in norms.items()}
