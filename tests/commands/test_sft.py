"""`hrpo sft` as a person runs it: from worked solutions to an adapter that all other commands take."""

import json
import shutil
import signal
from pathlib import Path

import processes
import pytest
import torch
from safetensors.torch import load_file
from tiny import byte_tokenizer, tiny_model
from transformers import AutoModelForCausalLM

from hrpo_patches.commands import eval as evaluation
from hrpo_patches.commands.main import main as cli
from hrpo_patches.commands.main import train
from hrpo_patches.commands.sft import main, parse
from hrpo_patches.models.base import open_model
from hrpo_patches.monitor.report import read_run
from hrpo_thinking.errors import InputError


def steps_of(n):
    return [f"{i}+{i} is {2 * i}" for i in range(1, n + 1)]


@pytest.fixture
def flags(tmp_path):
    tiny_model("qwen2", thinking=False).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    rows = [{"question": f"{i}?", "steps": steps_of(1 + i % 3), "answer": str(i)} for i in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {
        "model_name": tmp_path / "base",
        "dataset": tmp_path / "data.jsonl",
        "prompt": "plain",
        "lora_rank": 4,
        "lr": 1e-3,
        "per_device_train_batch_size": 4,
        "max_completion_length": 60,
        "advance_loss": 99,
        "advance_batches": 2,
        "logging_steps": 1,
        "save_steps": 1,
        "max_steps": 12,
    }
    return lambda folder, **more: [
        str(word)
        for name, value in (options | {"output_dir": tmp_path / folder} | more).items()
        if value is not None
        for word in (f"--{name}", value)
    ]


def log_of(folder):
    rows = json.loads((folder / "report.json").read_text())["log"]
    return [
        {
            key: value
            for key, value in row.items()
            if not any(word in key for word in ("time", "per_second", "train_loss"))
        }
        for row in rows
    ]


def test_its_adapter_is_what_every_other_command_takes(flags, tmp_path, capsys):
    run, data = tmp_path / "run", str(tmp_path / "data.jsonl")
    report = main([*flags("run", eval_problems=6, eval_steps=6), "--report"])
    assert report["stage"] == report["last_stage"] == report["thoughts"] == 3 and report["after"]["total"] == 6
    assert (run / "report.png").stat().st_size > 10_000
    assert "stage 3 of 3: 3 forced thoughts" in capsys.readouterr().out
    assert {"eval_accuracy", "eval_accuracy_off", "eval_loss"} <= set().union(*log_of(run))
    assert read_run(run).series("stage")[1][-1] == 3

    of_adapter = ["--adapter", str(run), "--dataset", data, "--prompt", "plain", "--max_new_tokens", "30"]
    results = evaluation.main([*of_adapter, "--split", "train", "--control", "all", "--out", str(tmp_path / "e.json")])
    assert [one["settings"]["thoughts"] for one in results["variations"]] == [3] * 6
    assert cli(["think", str(run), "--prompt", "2?", "--plain", "--max_new_tokens", "12"]) == 0
    assert cli(["merge", str(run), str(tmp_path / "merged")]) == 0
    merged, _ = open_model(str(tmp_path / "merged"))
    assert merged.generation_config.thoughts == 3 and merged.config.thinking["span"] == "thoughts"

    more = {"model_name": tmp_path / "base", "adapter": run, "dataset": data, "output_dir": tmp_path / "grpo"}
    more |= {"prompt": "plain", "max_steps": 1, "group_size": 2, "per_device_train_batch_size": 2, "span": "thoughts"}
    more |= {"gradient_accumulation_steps": 1, "max_completion_length": 12, "residual_scale": "embedding"}
    words = [str(word) for name, value in more.items() for word in (f"--{name}", value)]
    train([*words, "--lora_rank", "4"])
    assert json.loads((tmp_path / "grpo" / "thinking_config.json").read_text())["thoughts"] == 3
    with pytest.raises(InputError, match="--span 'thoughts', not 'marker'"):
        train([word for word in words if word not in ("--span", "thoughts")] + ["--output_dir", str(tmp_path / "no")])


def test_a_run_that_was_killed_in_a_stage_and_resumed_is_the_run_that_was_not(flags, tmp_path):
    more = {"projection_dropout": 0.2, "earlier": 0.4, "max_steps": 13, "bptt": 0}
    main(flags("whole", **more))
    words = [5, "sft", *flags("killed", **more)]
    done = processes.run(processes.signalled, "SIGKILL", "HRPOSFTTrainer", "training_step", *words)
    assert done.returncode == -signal.SIGKILL, done.stderr
    kept = json.loads((tmp_path / "killed" / "checkpoint-5" / "trainer_state.json").read_text())
    state = kept["stateful_callbacks"]["Curriculum"]["attributes"]
    assert 0 < state["stage"] < 3 and len(state["losses"]) == 1  # in the middle of a stage
    main([*flags("killed", **more), "--resume_from_checkpoint", "latest"])
    assert log_of(tmp_path / "killed") == log_of(tmp_path / "whole")
    one, other = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("killed", "whole"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("more", "word"),
    [({"until": 1}, "until=3 and thoughts_per_step=1, not 1 and 1"), ({"filler": "a"}, "--filler")],
)
def test_a_run_is_not_resumed_as_another(flags, more, word, tmp_path):
    main(flags("run", max_steps=8))
    with pytest.raises(InputError, match=word):
        main([*flags("run", **more), "--resume_from_checkpoint", "latest"])


def test_all_weights_can_be_trained_and_the_model_thinks_by_default(flags, tmp_path):
    report = main(flags("run", lora_rank=0, max_steps=8, until=1))
    model, _ = open_model(str(tmp_path / "run"))
    assert report["thoughts"] == model.generation_config.thoughts == 1
    assert not (tmp_path / "run" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"lora_rank": -1}, "--lora_rank"),
        ({"patience": 2}, "--eval_problems"),
        ({"until": 9}, "until=9 cannot be reached"),
        ({"residual": "none", "projection_start": "lstsq"}, "projection_start='lstsq'"),
        ({"task": "reasoning_gym:chain_sum", "dataset": None}, "problems without steps"),
        ({"task": "nq"}, "asks about documents"),
        ({"residual": "none", "r_min": 0.5}, "--r_min is about thinking"),
        ({"label_smoothing_factor": 0.5}, "label_smoothing_factor=0.5 is not supported"),
        ({"advance_loss": 0}, "advance_loss"),
        ({"eval_strategy": "steps"}, "require --eval_problems"),
        ({"eval_on_start": True}, "require --eval_problems"),
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 64}, "no step"),
        ({"max_completion_length": 10}, "max_completion_length=10"),
        ({"thoughts": 3}, "thoughts_per_step"),
        ({"answer_start": "is"}, "data.jsonl line 1 has a step with the answer marker"),
    ],
)
def test_what_cannot_work_is_a_sentence(flags, more, word, tmp_path):
    with pytest.raises(InputError, match=word):
        main(flags("run", **more))


def test_a_second_run_in_the_same_folder_is_refused(flags, tmp_path):
    main(flags("run", max_steps=7))
    with pytest.raises(InputError, match="already holds a run"):
        parse(flags("run"))
    shutil.rmtree(tmp_path / "run")
    parse(flags("run"))


def test_the_configs_are_read(tmp_path):
    for path in sorted((Path(__file__).parents[2] / "configs").glob("sft-*.yaml")):
        run = parse([*evaluation.with_config(["--config", str(path)]), "--output_dir", str(tmp_path / "run")])
        assert run.thinking() is not None


def test_without_thoughts_a_model_learns_to_write_its_steps_and_the_marker_and_stays_plain(flags, tmp_path):
    options = {"residual": "none", "until": 0, "lora_rank": 0, "lr": 1e-2, "max_steps": 40, "advance_loss": None}
    main(flags("warm", **options | {"advance_batches": None}))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "warm"), byte_tokenizer()
    assert model.config.thinking is None and not model.generation_config.thoughts
    report = json.loads((tmp_path / "warm" / "report.json").read_text())
    prompt = tokenizer(report["prompt"].replace("{question}", "4?"), return_tensors="pt")
    answer = tokenizer.decode(model.generate(**prompt, max_new_tokens=40, do_sample=False)[0])
    assert "####" in answer[len(report["prompt"]) - 20 :]


def test_two_processes_take_the_steps_and_stages_of_one(flags, tmp_path):
    alike = {"lr": 1e-4, "eval_problems": 4, "eval_steps": 6}
    main(flags("one", **alike))
    words = flags("two", **alike, per_device_train_batch_size=2)
    statuses = processes.each_rank(processes.hrpo, "sft", *words, folder=tmp_path, name="two")
    assert statuses == [0, 0], (tmp_path / "two.0.log").read_text()[-3000:]
    rows = [[row for row in log_of(tmp_path / name) if "loss" in row] for name in ("one", "two")]
    assert len(rows[0]) == 12 and rows[0][-1]["stage"] == 3
    for one, two in zip(*rows, strict=True):
        assert one["stage"] == two["stage"]
        assert two["loss"] == pytest.approx(one["loss"], rel=0.05)  # a mean over each process's tokens
    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two")]
    assert weights[0].keys() == weights[1].keys()
    record = json.loads((tmp_path / "two" / "report.json").read_text())
    assert record["after"]["total"] == 4 and record["thoughts"] == 3
