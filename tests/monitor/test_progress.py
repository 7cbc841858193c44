"""One line for each line of the log, of the main process."""

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from hrpo_patches.monitor import progress
from hrpo_patches.monitor.progress import ProgressLines


@pytest.fixture
def logged(tmp_path, monkeypatch, capsys):
    """What is printed of a run that begins after step 10 of 40, from its log lines by second and step."""

    def lines(rows, main_process=True, trains=True):
        clock = [100.0]
        monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
        args, state = TrainingArguments(str(tmp_path), use_cpu=True), TrainerState(global_step=10, max_steps=40)
        state.is_world_process_zero = main_process
        callback = ProgressLines()
        if trains:
            callback.on_train_begin(args, state, TrainerControl())
        for second, step, row in rows:
            clock[0], state.global_step = 100.0 + second, step
            callback.on_log(args, state, TrainerControl(), logs=row)
        return capsys.readouterr().out

    return lines


GRPO = {"loss": 0.012345, "reward": 0.25, "marker_rate": 0.5, "thinking/length": 12.25, "kl": 1.0, "a/mean": 0.99}


def test_a_line_has_step_loss_reward_marker_thinking_pace_and_time_left(logged):
    lines = logged([(4.0, 12, GRPO), (5.0, 13, GRPO)]).splitlines()
    shown = "loss 0.01235  reward 0.250  marker 50%  thinking 12.2 tokens"
    assert lines == [
        f"step 12/40  {shown}  2.00 s/step  0:00:56 left",  # 28 steps at 2 seconds
        f"step 13/40  {shown}  1.00 s/step  0:00:45 left",  # 27 steps at 5 seconds for 3
    ]


def test_stages_and_evaluations_have_lines_and_the_summary_at_the_end_has_none(logged):
    rows = [
        (5.0, 11, {"loss": 2.0, "stage": 1, "thoughts": 3.0, "loss_following": 1.0}),
        (6.0, 11, {"eval_loss": 1.5, "eval_accuracy": 0.5, "eval_accuracy_off": 0.25, "eval_stage": 1}),
        (7.0, 11, {"train_runtime": 7.0, "train_loss": 2.0}),
    ]
    assert logged(rows).splitlines() == [
        "step 11/40  loss 2  stage 1  thoughts 3.0  5.00 s/step  0:02:25 left",
        "step 11/40  evaluation  loss 1.5  accuracy 0.500  thoughts off 0.250",
    ]


def test_other_processes_print_nothing(logged):
    assert logged([(4.0, 12, GRPO)], main_process=False) == ""


def test_each_evaluation_set_has_a_line_with_its_name(logged):
    rows = [(5.0, 11, {"eval_sums_loss": 1.5, "eval_sums_runtime": 1.0}), (6.0, 11, {"eval_my_set_accuracy": 0.5})]
    assert logged(rows).splitlines() == [
        "step 11/40  evaluation sums  loss 1.5",
        "step 11/40  evaluation my_set  accuracy 0.500",
    ]


def test_what_is_no_number_is_not_shown_and_a_log_outside_of_training_has_no_pace(logged):
    rows = [(5.0, 11, {"loss": 2.0, "reward": None, "stage": "first"})]
    assert logged(rows, trains=False) == "step 11/40  loss 2\n"
