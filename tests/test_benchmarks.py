"""The comparison of residuals, whose numbers the documents print."""

import json
import runpy
import sys
from pathlib import Path

import processes
import pytest
import yaml
from tiny import byte_tokenizer, tiny_model

from hrpo_patches.monitor.report import Run

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ROWS = [{"question": f"{i} + 1?", "answer": f"<<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1}"} for i in range(8)]


@pytest.fixture
def base(tmp_path):
    tiny_model("qwen2", thinking=False).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return tmp_path / "base"


def script(name):
    return runpy.run_path(str(BENCHMARKS / f"{name}.py"))


def test_a_pair_that_differs_in_every_problem_has_a_small_p_and_an_equal_one_has_1():
    compare_pair = script("compare")["compare_pair"]
    right, wrong, mixed = [True] * 20, [False] * 20, [True, False] * 10
    assert compare_pair([right, right], [wrong, wrong])["difference"] == 1
    assert compare_pair([right, right], [wrong, wrong])["p"] < 0.001
    assert compare_pair([mixed], [mixed]) == {"difference": 0, "p": 1}
    one, other = compare_pair([right], [mixed]), compare_pair([mixed], [right])
    assert one["difference"] == -other["difference"] == 0.5 and one["p"] == pytest.approx(other["p"], abs=0.01)
    with pytest.raises(ValueError, match="zip"):
        compare_pair([right], [wrong[:-1]])


def test_the_mean_of_runs_has_the_steps_and_the_numbers_that_all_of_them_have():
    runs = [
        Run("a", "none", [{"step": 1, "loss": 1.0, "reward": 0.0}, {"step": 2, "loss": 1.0, "reward": 1.0}], {}),
        Run("b", "none", [{"step": 1, "loss": 3.0, "reward": 1.0}, {"step": 2, "loss": 1.0, "extra": 1.0}], {}),
    ]
    found = script("compare")["averaged"]("none", runs)
    assert found.rows == [{"step": 1, "loss": 2.0, "reward": 0.5}, {"step": 2, "loss": 1.0}]
    assert found.name == "mean of 2 seeds"


def test_residuals_are_trained_evaluated_and_compared_and_nothing_is_done_twice(base, tmp_path, monkeypatch, capsys):
    config = tmp_path / "config.yaml"
    settings = {"model_name": base, "dataset": tmp_path / "data.jsonl", "prompt": "plain", "optimizer": "adamw_torch"}
    settings = {key: str(value) for key, value in settings.items()}
    settings |= {"max_steps": 1, "max_completion_length": 4, "per_device_train_batch_size": 4, "report": False}
    config.write_text(yaml.safe_dump(settings | {"gradient_accumulation_steps": 1}))

    def forked(command, **_):
        done = processes.run(processes.module if command[1] == "-m" else processes.script, *command[1:])
        assert done.returncode == 0, done.stderr

    monkeypatch.setattr("subprocess.run", forked)

    def compare(out):
        flags = ["--config", config, "--seeds", 42, "--residuals", "projection", "none", "--limit", 5]
        flags += ["--runs", tmp_path / "runs", "--out", tmp_path / out]
        monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, flags)])
        script("compare")["main"]()
        return json.loads((tmp_path / f"{out}.json").read_text())

    def times():
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*") if path.name != "config.yaml"}

    record = compare("first")
    rows = [(row["residual"], row["read_out"], len(row["shares"])) for row in record["conditions"]]
    assert rows == [("projection", "thinking", 1), ("projection", "hard", 1), ("none", "hard", 1)]
    pairs = [(pair["one"], pair["other"]) for pair in record["pairs"]]
    assert len(pairs) == 3 and ("projection, thinking", "none, hard") in pairs
    assert "| projection | thinking |" in (tmp_path / "first.md").read_text() and (tmp_path / "first.png").is_file()
    for residual, read_out in (("projection", "thinking"), ("projection", "hard"), ("none", "hard")):
        run = tmp_path / "runs" / f"{residual}-42"
        trained = json.loads((run / "report.json").read_text())["arguments"]
        assert (trained["residual"], trained["seed"], trained["max_steps"]) == (residual, 42, 1)
        answered = json.loads((tmp_path / "runs" / f"{run.name}.{read_out}.5-1000.json").read_text())["settings"]
        assert (answered["adapter"], answered["thinking"]) == (str(run), read_out == "thinking")
        assert (answered["limit"], answered["seed"], answered["max_new_tokens"]) == (5, 1000, 4)
    before = times()
    assert compare("second") == record and times() == before
    with pytest.raises(SystemExit):
        compare("second")
    assert "second.json exists already" in capsys.readouterr().err
    config.write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit):
        compare("third")
    assert "holds runs of another configuration" in capsys.readouterr().err
