"""The training scripts, each with a file of its own kind of problems."""

import json
import runpy

import pytest
from runs import SCRIPTS, assert_smollm2_learns_gsm8k, parse
from tiny import byte_tokenizer, tiny_model

from hrpo_thinking.errors import InputError

ROWS = {
    "gsm8k": {"question": "What is {i} + 1?", "answer": "#### 2"},
    "math": {"problem": "What is ${i}$?", "solution": "It is \\boxed{{2}}."},
    "mmlu": {"question": "Which, {i}?", "choices": ["a", "b"], "answer": 1},
    "rag": {"question": "Where, {i}?", "golden_answers": ["Lyon"], "context": ["Ida was born in Lyon."]},
}
TINY = {"max_steps": 1, "max_completion_length": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}


@pytest.fixture
def base(tmp_path):
    tiny_model("qwen2", thinking=False).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def write(path, row):
    rows = [
        {key: value.format(i=i) if isinstance(value, str) else value for key, value in row.items()} for i in range(12)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize("name", ROWS)
def test_a_script_trains_on_its_task(name, base, tmp_path):
    write(tmp_path / "data.jsonl", ROWS[name])
    options = TINY | {
        "model_name": base,
        "dataset": tmp_path / "data.jsonl",
        "output_dir": tmp_path / "run",
        "shots": 1,
    }
    flags = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    record = runpy.run_path(str(SCRIPTS / f"hrpo_{name}.py"))["main"](flags)
    assert record["arguments"]["task"] == name and record["log"][0]["projection/grad_norm"] > 0
    with pytest.raises(InputError, match="needs 'Body' and 'Question' and 'Answer'"):
        other = tmp_path / "other"
        runpy.run_path(str(SCRIPTS / f"hrpo_{name}.py"))["main"](
            [*flags, "--task", "svamp", "--output_dir", str(other)]
        )


@pytest.mark.smollm2
@pytest.mark.shared_data
@pytest.mark.parametrize("engine", ["generate", "continuous"])
def test_a_real_model_trains_on_real_problems(shared_data, tmp_path, engine):
    assert_smollm2_learns_gsm8k(engine, shared_data, tmp_path / "run")


def test_the_reward_for_the_format_is_small_optional_and_reported_apart(base, tmp_path):
    write(tmp_path / "data.jsonl", ROWS["gsm8k"])
    options = TINY | {"model_name": base, "dataset": tmp_path / "data.jsonl", "answer_start": "a"}
    flags = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    main = runpy.run_path(str(SCRIPTS / "hrpo_gsm8k.py"))["main"]
    (plain, *_), (formed, *_) = (
        main([*flags, "--output_dir", str(tmp_path / f"run{weight}"), "--format_reward", str(weight)])["log"]
        for weight in (0, 0.25)
    )
    answer, form = "rewards/answer_is_right/mean", "rewards/answer_has_its_format/mean"
    assert form not in plain and plain["reward"] == plain[answer]
    assert formed["reward"] == pytest.approx(formed[answer] + 0.25 * formed[form])
    assert 0 <= formed[form] <= 1


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--task", "gsm9k"], "did you mean gsm8k"),
        (["--shots", "9"], "has 4 worked examples, not 9"),
        (["--shots", "1", "--examples", "1 + 1 = 2 #### 2"], "remove one"),
        (["--engine", "continuous", "--use_vllm"], "--engine continuous and TRL's own flags ask for two engines"),
        (["--format_reward", "-1"], "--format_reward must be 0 or more"),
    ],
)
def test_options_of_a_task_that_cannot_work_are_refused_before_any_work(flags, sentence, tmp_path):
    with pytest.raises(InputError, match=sentence):
        parse([*flags, "--output_dir", str(tmp_path / "run")])


def test_a_yaml_file_may_name_the_task_and_a_flag_wins_over_it(tmp_path):
    (tmp_path / "c.yaml").write_text("task: svamp\n")
    config = ["--config", str(tmp_path / "c.yaml"), "--output_dir", str(tmp_path / "run")]
    assert parse(config, "math").about.task == "svamp"
    assert parse([*config, "--task", "mmlu"], "math").about.task == "mmlu"
    assert parse(config[2:], "math").about.task == "math" and parse(config[2:]).about.task == "gsm8k"
