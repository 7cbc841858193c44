"""The log of a run: whole lines of JSON, also when it was cut short, and never two runs in one."""

import json

import numpy
import pytest
import torch

from hrpo_patches.monitor.log import RunLog, read_rows
from hrpo_thinking.errors import InputError


def test_every_line_is_one_object_and_has_no_nan(tmp_path):
    log = RunLog(tmp_path / "new" / "run")
    log.begin(0, {"residual": "none"})
    log.write({"step": 1, "loss": float("nan"), "kl": float("inf"), "reward": 0.5})
    lines = log.path.read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == [
        {"step": 0, "run": {"residual": "none"}},
        {"step": 1, "loss": None, "kl": None, "reward": 0.5},
    ]
    assert read_rows(log.path) == [json.loads(line) for line in lines]


def test_a_second_run_from_the_start_is_refused_and_the_first_one_kept(tmp_path):
    log = RunLog(tmp_path)
    log.begin(0, {})
    before = log.path.read_bytes()
    with pytest.raises(InputError, match="holds another run's log; give another output_dir"):
        RunLog(tmp_path).begin(0, {})
    assert log.path.read_bytes() == before


def test_a_resumed_run_takes_the_steps_again_that_came_after_its_checkpoint(tmp_path):
    log = RunLog(tmp_path)
    log.begin(0, {"residual": "projection"})
    for step in range(1, 6):
        log.write({"step": step})
    with log.path.open("a") as file:
        file.write('{"step": 6, "loss"')  # a line that was cut
    assert [row["step"] for row in read_rows(log.path)] == [0, 1, 2, 3, 4, 5]
    log.begin(3, {"residual": "other"})
    log.write({"step": 4})
    rows = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4] and rows[0]["run"] == {"residual": "projection"}


def test_a_run_that_goes_on_in_another_folder_starts_a_log_there(tmp_path):
    RunLog(tmp_path).begin(7, {"residual": "none"})
    assert read_rows(tmp_path / "monitor.jsonl") == [{"step": 0, "run": {"residual": "none"}}]


@pytest.mark.parametrize("line", ["{", "7", '"text"'])
def test_a_damaged_line_is_named(line, tmp_path):
    (tmp_path / "monitor.jsonl").write_text(f'{{"step": 0}}\n{line}\n')
    with pytest.raises(InputError, match="line 2 of .* is no JSON object"):
        read_rows(tmp_path / "monitor.jsonl")


def test_the_log_of_another_run_is_not_gone_on_with(tmp_path):
    log = RunLog(tmp_path)
    log.begin(0, {"residual": "none"})
    log.write({"step": 1, "loss": 0.5})
    log.write({"step": 2, "loss": float("nan")})
    before = log.path.read_bytes()
    with pytest.raises(InputError, match="holds another run's log"):
        log.begin(2, {}, [{"step": 1, "loss": 0.4}])
    assert log.path.read_bytes() == before
    log.begin(2, {}, [{"step": 1, "loss": 0.5}, {"step": 2, "loss": float("nan")}, {"step": 2, "eval_loss": 1.0}])
    assert len(read_rows(log.path)) == 3


def test_numbers_of_torch_and_numpy_are_numbers(tmp_path):
    log = RunLog(tmp_path)
    log.begin(0, {})
    log.write({"step": 1, "loss": torch.tensor(0.5), "kl": numpy.float32(0.25)})
    assert read_rows(log.path)[1] == {"step": 1, "loss": 0.5, "kl": 0.25}
