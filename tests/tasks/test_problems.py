"""Files, generators and prompts: what goes in, and one sentence for what cannot."""

import json

import pytest

from hrpo_patches.tasks import task_named
from hrpo_patches.tasks.problems import find_task, load_problems, split_held_out
from hrpo_patches.tasks.prompts import examples_of, prompt_of
from hrpo_thinking.errors import InputError

OPTIONS = "min_terms=2&max_terms=2&min_digits=1&max_digits=2&operators=[%2B]&allow_parentheses=false"
SUMS = f"reasoning_gym:basic_arithmetic?{OPTIONS}&allow_negation=false"


GSM8K = task_named("gsm8k")


def sums(size, seed):
    return load_problems(find_task(SUMS, None, size, seed))


def write(tmp_path, *lines):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines))
    return str(path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, r"data\.jsonl does not exist"),
        ([], "has no rows"),
        (["", "  "], "has no rows"),
        (['{"question": "a", "answer": "1"}', "not json"], "is not JSON on line 2"),
        (['{"question": "a", "answer": "1"}', "", "[1]"], "line 3 is not a JSON object"),
        (
            ['{"query": "a", "answer": "1"}'],
            r"line 1 has \['answer', 'query'\], but a problem of gsm8k needs 'question' and 'answer'",
        ),
        (['{"question": "a", "answer": " "}'], r"line 1 has \['question'\], but"),
        (['{"question": "a", "answer": "because\\n####"}'], "line 1 has nothing after ####"),
    ],
)
def test_bad_data_is_one_sentence_that_names_the_line(tmp_path, lines, message):
    path = write(tmp_path, *lines) if lines is not None else str(tmp_path / "data.jsonl")
    with pytest.raises(InputError, match=message) as error:
        load_problems(GSM8K, path)
    assert "\n" not in str(error.value)


def test_other_line_ends_are_text_and_other_encodings_an_error(tmp_path):
    path = write(tmp_path, json.dumps({"question": "a\u2028b", "answer": "1"}, ensure_ascii=False))
    assert load_problems(GSM8K, path)[0]["question"] == "a\u2028b"
    (tmp_path / "data.jsonl").write_bytes(b'{"question": "\xff\xfe", "answer": "1"}')
    with pytest.raises(InputError, match="not UTF-8 on line 1"):
        load_problems(GSM8K, path)


def test_a_folder_holds_a_file_for_each_part(tmp_path):
    for part in ("train", "test"):
        (tmp_path / f"{part}.jsonl").write_text(json.dumps({"question": part, "answer": "1"}))
        assert load_problems(GSM8K, str(tmp_path), part) == [{"question": part, "answer": ["1"]}]
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(InputError, match=r"test\.jsonl does not exist"):
        load_problems(GSM8K, str(tmp_path), "test")


def test_reasoning_gym_takes_its_options_and_a_seed():
    rows = sums(30, 3)
    assert rows == sums(30, 3) != sums(30, 4)
    for row in rows:
        terms = row["question"].removeprefix("Calculate ").removesuffix(".").split(" + ")
        assert sum(map(int, terms)) == int(row["answer"][0])


@pytest.mark.parametrize("name", ["reasoning_gym:chain_sum?min_terms=abc", "reasoning_gym:chain_sum?no_such_option=1"])
def test_an_unknown_generator_or_option_is_one_sentence(name):
    with pytest.raises(InputError, match="reasoning-gym cannot make"):  # before any problem is made
        find_task("gsm8k", name)


def test_held_out_questions_are_distinct_and_never_trained_on():
    problems = sums(500, 0)
    train, held_out = split_held_out(problems, 100, seed=0)
    questions = {row["question"] for row in held_out}
    assert len(held_out) == len(questions) == 100
    assert not questions & {row["question"] for row in train}
    assert split_held_out(problems, 100, seed=0) == (train, held_out)
    assert split_held_out(problems, 100, seed=1)[1] != held_out
    assert split_held_out(problems, 0, seed=0) == (problems, [])
    with pytest.raises(InputError, match="too few"):
        split_held_out(problems[:5], 5, seed=0)


def test_a_plain_prompt_is_its_examples_and_the_question():
    assert prompt_of(GSM8K, "Calculate 1 + 1.", "####", ["Calculate 2 + 3.\n#### 5"], chat=False) == (
        "Calculate 2 + 3.\n#### 5\n\nCalculate 1 + 1.\n"
    )


def test_a_prompt_without_examples_says_what_the_marker_is_for():
    system, user = prompt_of(GSM8K, "Calculate 1 + 1.", "ANSWER:", [], chat=True)
    assert "ANSWER:" in system["content"] and user == {"role": "user", "content": "Calculate 1 + 1."}
    assert "ANSWER:" in prompt_of(GSM8K, "Calculate 1 + 1.", "ANSWER:", [], chat=False)


def test_worked_examples_are_the_users_or_the_tasks_first(tmp_path):
    own = ["2 + 3 = 5 #### 5"]
    assert examples_of(GSM8K, "####", 0, []) == [] and examples_of(GSM8K, "####", 0, own) == own
    two = examples_of(GSM8K, "</a>", 2, [])
    assert len(two) == 2 and all(example.count("</a>") == 1 for example in two)
    with pytest.raises(InputError, match="has 4 worked examples, not 9"):
        examples_of(GSM8K, "####", 9, [])
    with pytest.raises(InputError, match="has 4 worked examples, not -1"):
        examples_of(GSM8K, "####", -1, [])
    with pytest.raises(InputError, match="makes its own problems; remove --dataset own.jsonl"):
        find_task("reasoning_gym:chain_sum", "own.jsonl")
    with pytest.raises(InputError, match="remove one"):
        examples_of(GSM8K, "####", 1, own)
    with pytest.raises(InputError, match="carry the marker '####' once"):
        examples_of(GSM8K, "####", 0, [*own, "1 + 1 = 2"])


def test_data_of_the_hub_is_asked_for_by_id_config_and_split(monkeypatch):
    asked = []

    def load_dataset(identifier, config, split):
        asked.append((identifier, config, split))
        return [{"question": "q", "choices": ["a", "b"], "answer": 1}]

    monkeypatch.setattr("hrpo_patches.tasks.sources.load_dataset", load_dataset)
    mmlu = task_named("mmlu")
    assert len(load_problems(mmlu)) == 3
    load_problems(mmlu, split="test")
    load_problems(mmlu, "own/data", split="test")
    load_problems(mmlu, "own/data:part@dev")
    assert asked == [
        ("cais/mmlu", "all", "auxiliary_train"),
        ("allenai/ai2_arc", "ARC-Challenge", "train"),
        ("allenai/ai2_arc", "ARC-Easy", "train"),
        ("TIGER-Lab/MMLU-STEM", None, "test"),
        ("own/data", None, "test"),
        ("own/data", "part", "dev"),
    ]


def test_data_that_the_hub_does_not_have_is_one_sentence(monkeypatch):
    def load_dataset(identifier, config, split):
        raise FileNotFoundError("no such\ndata set")

    monkeypatch.setattr("hrpo_patches.tasks.sources.load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"'own/data' could not be loaded \(no such data set\); a path must end in"):
        load_problems(GSM8K, "own/data")
    with pytest.raises(InputError, match="bamboogle has no train data; name some with --dataset"):
        load_problems(task_named("bamboogle"))
