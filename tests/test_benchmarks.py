"""The benchmarks whose numbers the documents print: the warm-up and the comparison of residuals."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny import byte_tokenizer, tiny_model
from transformers import AutoModelForCausalLM

from hrpo_patches.monitor.report import Run
from hrpo_thinking.errors import InputError

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


def test_a_lesson_is_the_prompt_of_training_and_a_solution_that_alone_is_learned():
    tokenizer = byte_tokenizer()
    lesson = script("warm_up")["lesson"](ROWS[3], "row 3", tokenizer, False)
    learned = [token for token in lesson["labels"] if token != -100]
    assert tokenizer.decode(learned) == "4.\n#### 4<end>"
    prompt = tokenizer.decode(lesson["input_ids"][: -len(learned)])
    assert prompt.endswith("\n\n3 + 1?\n") and "####" in prompt
    assert lesson["input_ids"][-len(learned) :] == learned and lesson["labels"][-len(learned) :] == learned


def test_a_row_without_a_worked_solution_is_no_lesson():
    with pytest.raises(InputError, match="row 3 has no worked solution"):
        script("warm_up")["lesson"]({"question": "3 + 1?", "answer": "4"}, "row 3", byte_tokenizer(), False)


def test_a_warmed_up_model_writes_the_marker_and_is_a_plain_one(base, tmp_path, capsys):
    flags = ["--model_name", base, "--dataset", tmp_path / "data.jsonl", "--out", tmp_path / "warm"]
    flags = list(map(str, [*flags, "--max_steps", 40, "--lr", "1e-2", "--batch_size", 4]))
    script("warm_up")["main"](flags)
    tokenizer = byte_tokenizer()
    lesson = script("warm_up")["lesson"](ROWS[3], "row 3", tokenizer, False)
    prompt = torch.tensor([lesson["input_ids"][: lesson["labels"].count(-100)]])

    def answer(folder):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.config.thinking is None
        return tokenizer.decode(model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :])

    assert "####" in answer(tmp_path / "warm") and "####" not in answer(base)
    with pytest.raises(SystemExit):
        script("warm_up")["main"](flags)
    assert "warm exists already" in capsys.readouterr().err
    (tmp_path / "data.jsonl").write_text("")
    with pytest.raises(InputError, match="has no rows"):
        script("warm_up")["main"]([*flags, "--out", str(tmp_path / "other")])


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
