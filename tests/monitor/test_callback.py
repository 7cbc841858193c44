"""The monitor in real runs: what it measures reaches every log, and each planted fault makes it speak once."""

import json
import logging
import sys
import time
from pathlib import Path

import processes
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from runs import lora, small_trainer
from tiny import tiny_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from hrpo_patches import monitor_thinking
from hrpo_patches.monitor.log import read_rows
from hrpo_patches.thinking.mixin import ThinkingMixin
from hrpo_thinking.errors import InputError
from hrpo_thinking.inputs import ThinkingInputs
from hrpo_thinking.parts import parts_of

MEASURES = {
    *(f"{name}/{kind}" for name in ("a", "i", "decay") for kind in ("mean", "min", "max")),
    *(f"{group}/grad_norm" for group in ("base", "gate", "Lambda", "projection")),
    *("projection/weight_norm", "projection/drift", "projection/effective_rank"),
    *("cosine/token", "cosine/embedding", "Lambda/min", "Lambda/max", "marker_rate"),
}


class Reports(TrainerCallback):
    """Stands where tensorboard's and wandb's callbacks stand: between the default ones and the user's."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def steps(folder):
    return [row for row in read_rows(Path(folder) / "monitor.jsonl") if "loss" in row]


def warnings_of(trainer, caplog):
    with caplog.at_level(logging.WARNING, logger="hrpo_patches"):
        trainer.train()
    said = [record.getMessage() for record in caplog.records if record.name == "hrpo_patches.monitor.callback"]
    assert said == trainer.monitor.said
    assert said == [text for row in steps(trainer.args.output_dir) for text in row.get("warnings", [])]
    return said


def test_every_measure_is_in_the_log_lines_of_the_reporters_the_state_and_the_file(family, tmp_path):
    trainer, reports = small_trainer(tmp_path, family, max_steps=2), Reports()
    trainer.callback_handler.callbacks.insert(1, reports)
    trainer.train()
    for rows in (reports.logs, trainer.state.log_history, steps(tmp_path)):
        assert rows[0].keys() >= MEASURES and rows[1].keys() >= MEASURES
    assert steps(tmp_path)[1].items() >= reports.logs[1].items()
    first, second = steps(tmp_path)
    assert first["projection/drift"] == 0 < second["projection/drift"]
    assert first["a/min"] < first["a/mean"] < first["a/max"] and abs(first["a/mean"] - first["embeds_ratio"]) < 0.05
    assert abs(first["cosine/token"]) < 1 and abs(first["cosine/embedding"]) < 1


def test_the_gradient_norms_are_those_before_clipping(tmp_path):
    norms, reports = {}, []
    for limit in (1e-3, 0.0):
        trainer = small_trainer(tmp_path / str(limit), max_grad_norm=limit)
        trainer.train()
        (row,) = steps(trainer.args.output_dir)
        norms[limit] = [row[f"{group}/grad_norm"] for group in ("base", "gate", "Lambda", "projection")]
        reports.append(row["grad_norm"])
    assert norms[1e-3] == pytest.approx(norms[0.0], rel=1e-3)
    assert sum(norm**2 for norm in norms[0.0]) ** 0.5 == pytest.approx(reports[0], rel=1e-3)


def test_only_logged_steps_are_measured_and_only_their_first_batch(tmp_path, monkeypatch):
    trainer = small_trainer(tmp_path, max_steps=4, logging_steps=2, gradient_accumulation_steps=2)
    seen, original = [], sys.modules["hrpo_patches.monitor.callback"].measure_blend
    monkeypatch.setattr(
        "hrpo_patches.monitor.callback.measure_blend",
        lambda *args: seen.append(trainer.state.global_step) or original(*args),
    )
    trainer.train()
    assert seen == [1, 3] and [row["step"] for row in steps(tmp_path)] == [2, 4]


def test_what_is_measured_is_the_first_batch_at_the_sampling_temperature(tmp_path, monkeypatch):
    trainer = small_trainer(tmp_path, gradient_accumulation_steps=2, temperature=0.7)
    forwards, measured = [], []
    backbone, original = trainer.monitor.backbone, sys.modules["hrpo_patches.monitor.callback"].measure_blend

    def see(module, args, kwargs):
        if torch.is_grad_enabled():
            forwards.append(kwargs["thinking_inputs"])

    backbone.register_forward_pre_hook(see, with_kwargs=True)
    monkeypatch.setattr(
        "hrpo_patches.monitor.callback.measure_blend", lambda *args: measured.append(args) or original(*args)
    )
    trainer.train()
    ((_, _, inputs, temperature),) = measured
    assert len(forwards) == 2 and inputs["thinking_inputs"] is forwards[0] and temperature == 0.7


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"logging_steps": 3, "logging_first_step": True}, [0, 2]),
        ({"logging_strategy": "epoch", "num_train_epochs": 2, "max_steps": -1}, [15, 31]),
        ({"logging_strategy": "no"}, []),
    ],
)
def test_the_steps_that_are_logged_are_the_ones_that_are_measured(options, expected, tmp_path, monkeypatch):
    trainer, seen = small_trainer(tmp_path, **{"max_steps": 4} | options), []
    monkeypatch.setattr(
        "hrpo_patches.monitor.callback.measure_weights", lambda *args: seen.append(trainer.state.global_step) or {}
    )
    trainer.train()
    assert seen == expected


def test_the_cost_counts_the_look_at_every_batch(tmp_path, monkeypatch):
    trainer = small_trainer(tmp_path, gradient_accumulation_steps=4)
    monkeypatch.setattr(trainer.monitor, "_refuse_nonfinite", lambda *args: time.sleep(0.02))
    trainer.train()
    assert trainer.monitor.seconds > 4 * 0.02


def test_drift_continues_from_the_same_start_in_a_run_whose_projection_was_drawn_again(tmp_path):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    small_trainer(tmp_path, **options).train()
    straight = [row["projection/drift"] for row in steps(tmp_path)]
    model = tiny_model("llama", thinking={"r_min": 0.5, "r_max": 0.9})
    torch.manual_seed(99)
    model.model.thinking_projection.reset_parameters()
    again = small_trainer(tmp_path, model=model, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert [row["projection/drift"] for row in steps(tmp_path)] == pytest.approx(straight, rel=1e-5)
    (tmp_path / "monitor_start.safetensors").unlink()
    blind = small_trainer(tmp_path, **options)
    blind.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "projection/drift" not in steps(tmp_path)[-1] and "projection/weight_norm" in steps(tmp_path)[-1]


def test_a_new_trainer_takes_the_hook_of_a_failed_one_off(tmp_path):
    model = tiny_model("llama", thinking={"r_min": 0.5, "r_max": 0.9})
    options = {"model": model, "peft_config": None, "beta": 0.0}
    failed = small_trainer(tmp_path / "a", reward=lambda completions, **_: 1 / 0, **options)
    with pytest.raises(ZeroDivisionError):
        failed.train()
    assert len(model.model._forward_pre_hooks) == 1
    small_trainer(tmp_path / "b", **options).train()
    assert not model.model._forward_pre_hooks


def test_a_run_goes_the_same_way_without_a_monitor(tmp_path):
    weights = []
    for monitor in (True, False):
        trainer = small_trainer(tmp_path / str(monitor), max_steps=2, monitor=monitor)
        trainer.train()
        weights.append([p.detach().clone() for p in trainer.model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))
    assert not (tmp_path / "False" / "monitor.jsonl").exists() and trainer.monitor is None


def test_its_hook_comes_off_again_and_its_cost_is_logged(tmp_path):
    trainer = small_trainer(tmp_path)
    trainer.train()
    assert not trainer.monitor.backbone._forward_pre_hooks
    last = read_rows(tmp_path / "monitor.jsonl")[-1]
    assert 0 < last["monitor_seconds"] < last["train_seconds"]


def test_plain_grpo_has_a_log_too(tmp_path):
    trainer = small_trainer(tmp_path, residual="none")
    trainer.train()
    rows = read_rows(tmp_path / "monitor.jsonl")
    assert rows[0]["run"]["residual"] == "none" and "reward" in rows[1] and "a/mean" not in rows[1]


def test_evaluating_before_training_starts_no_log(tmp_path):
    trainer = small_trainer(tmp_path, per_device_eval_batch_size=4)
    trainer.evaluate(Dataset.from_dict({"prompt": ["Hi"]}))
    assert not (tmp_path / "monitor.jsonl").exists()
    trainer.train()
    trainer.evaluate(Dataset.from_dict({"prompt": ["Hi"]}))
    assert "eval_reward" in read_rows(tmp_path / "monitor.jsonl")[-1]


def test_another_runs_log_is_an_error_before_the_first_step(tmp_path):
    small_trainer(tmp_path).train()
    before = (tmp_path / "monitor.jsonl").read_bytes()
    trainer = small_trainer(tmp_path)
    with pytest.raises(InputError, match="holds another run's log"):
        trainer.train()
    assert trainer.state.global_step == 0 and (tmp_path / "monitor.jsonl").read_bytes() == before


class Replay(Trainer):
    """A trainer of somebody else: supervised, with made-up states."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        torch.manual_seed(0)
        batch, width = inputs["input_ids"].shape
        states = torch.randn(batch, width - 1, model.config.hidden_size)
        mask = torch.ones(batch, width - 1, dtype=torch.bool)
        mask[0, -2:] = False
        return model(**inputs, thinking_inputs=ThinkingInputs(states, mask)).loss


def supervised(folder, model):
    ids = torch.arange(48).view(4, 12)
    data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist(), "attention_mask": [[1] * 12] * 4})
    options = {"max_steps": 2, "logging_steps": 1, "report_to": "none", "use_cpu": True, "save_strategy": "no"}
    return Replay(model, TrainingArguments(str(folder), per_device_train_batch_size=4, **options), train_dataset=data)


def test_any_trainer_can_be_watched(tmp_path):
    model = get_peft_model(tiny_model("qwen2"), lora(modules_to_save=parts_of("projection")))
    trainer = supervised(tmp_path, model)
    monitor = monitor_thinking(trainer)
    assert trainer.callback_handler.callbacks[0] is monitor
    with pytest.raises(InputError, match="has a monitor already"):
        monitor_thinking(trainer)
    trainer.train()
    assert trainer.state.log_history[0].keys() >= MEASURES and steps(tmp_path)[0]["marker_rate"] == 0.25


def test_a_trainer_without_trainable_thinking_is_refused(tmp_path):
    with pytest.raises(InputError, match="no trainable thinking weights"):
        monitor_thinking(supervised(tmp_path, get_peft_model(tiny_model("llama"), lora())))


def test_measures_reach_tensorboard(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trainer = small_trainer(tmp_path, report_to="tensorboard")
    trainer.train()
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    for name in MEASURES:
        (event,) = events.Scalars(f"train/{name}")
        assert event.value == pytest.approx(trainer.state.log_history[0][name], rel=1e-5)


# --- planted faults: each makes the run say one thing, once ---------------------------------------------------------


def nothing_right(completions, **_):
    return [0.0 for _ in completions]


def test_a_marker_that_never_comes(tmp_path, caplog):
    trainer = small_trainer(tmp_path, answer_start="</answer>", max_steps=24, reward=nothing_right)
    (text,) = warnings_of(trainer, caplog)
    assert "'</answer>'" in text and "worked example" in text and "cut at 10 tokens" in text


def test_a_reward_that_stays_zero(tmp_path, caplog):
    trainer = small_trainer(tmp_path, answer_start="a", max_steps=24, reward=nothing_right)
    (text,) = warnings_of(trainer, caplog)
    assert "reward has been 0 for 20 steps" in text


@pytest.mark.parametrize(
    ("low", "high", "sentence"),
    [(0.99999, 0.999999, "as good as switched off"), (1e-12, 1e-10, "hardly reach the model")],
)
def test_a_share_that_saturates(low, high, sentence, tmp_path, caplog):
    model = tiny_model("llama", thinking={"r_min": low, "r_max": high})
    (text,) = warnings_of(small_trainer(tmp_path, model=model, max_steps=12, beta=0.0, bptt=0), caplog)
    assert sentence in text


def test_a_projection_without_a_gradient(tmp_path, caplog, monkeypatch):
    projected = ThinkingMixin.projected_residual
    monkeypatch.setattr(ThinkingMixin, "projected_residual", lambda self, states: projected(self, states).detach())
    (text,) = warnings_of(small_trainer(tmp_path, max_steps=12), caplog)
    assert "no gradient in 5 logged steps" in text


def test_a_projection_that_does_not_move(tmp_path, caplog):
    (text,) = warnings_of(small_trainer(tmp_path, max_steps=12, lr_thinking_projection=0.0), caplog)
    assert "has a gradient but has not moved" in text


def test_a_kl_divergence_that_runs_away(tmp_path, caplog):
    (text,) = warnings_of(small_trainer(tmp_path, max_steps=16, learning_rate=0.3, beta=1e-6), caplog)
    assert "above 1.0 nats a token" in text and "raise beta" in text


def test_a_healthy_run_says_nothing(tmp_path, caplog):
    assert warnings_of(small_trainer(tmp_path, answer_start="a", max_steps=22, learning_rate=1e-4), caplog) == []


def test_a_killed_run_leaves_whole_lines(tmp_path):
    program = f"""
import os, signal
import hrpo_patches
from runs import small_trainer
from transformers import TrainerCallback

class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

trainer = small_trainer({str(tmp_path)!r}, max_steps=5)
trainer.add_callback(Kill())
trainer.train()
"""
    assert processes.run(program).returncode == -9
    lines = (tmp_path / "monitor.jsonl").read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and all(line.endswith("\n") for line in lines)
