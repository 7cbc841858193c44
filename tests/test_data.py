"""Files, generators and prompts: what goes in, and one sentence for what cannot."""

import json

import pytest

from hrpo_patches.data import check_examples, gold_answer, load_problems, prompt_of, split_held_out
from hrpo_patches.errors import InputError

OPTIONS = "min_terms=2&max_terms=2&min_digits=1&max_digits=2&operators=[%2B]&allow_parentheses=false"
SUMS = f"reasoning_gym:basic_arithmetic?{OPTIONS}&allow_negation=false"


def write(tmp_path, *lines):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines))
    return str(path)


def test_gsm8k_rows_become_question_and_gold(tmp_path):
    row = {"question": "How many?\n", "answer": "He has 3 <<1+2=3>>3.\n#### 1,003"}
    assert load_problems(write(tmp_path, json.dumps(row), "")) == [{"question": "How many?", "answer": "1,003"}]


def test_an_answer_without_a_marker_is_the_gold_itself():
    assert gold_answer(" 42 ") == "42"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, r"data\.jsonl does not exist"),
        ([], "is empty"),
        (["", "  "], "is empty"),
        (['{"question": "a", "answer": "1"}', "not json"], "is not JSON on line 2"),
        (['{"question": "a", "answer": "1"}', "", "[1]"], "line 3 is not a JSON object"),
        (['{"query": "a", "answer": "1"}'], r"line 1 has no 'question'; it has \['answer', 'query'\]"),
        (['{"question": "a", "answer": " "}'], "line 1 has no 'answer'"),
        (['{"question": "a", "answer": "because\\n####"}'], "line 1 has nothing after ####"),
    ],
)
def test_bad_data_is_one_sentence_that_names_the_line(tmp_path, lines, message):
    path = write(tmp_path, *lines) if lines is not None else str(tmp_path / "data.jsonl")
    with pytest.raises(InputError, match=message) as error:
        load_problems(path)
    assert "\n" not in str(error.value)


def test_other_line_ends_are_text_and_other_encodings_an_error(tmp_path):
    path = write(tmp_path, json.dumps({"question": "a\u2028b", "answer": "1"}, ensure_ascii=False))
    assert load_problems(path)[0]["question"] == "a\u2028b"
    (tmp_path / "data.jsonl").write_bytes(b'{"question": "\xff\xfe", "answer": "1"}')
    with pytest.raises(InputError, match="not UTF-8 on line 1"):
        load_problems(path)
    with pytest.raises(InputError, match="is a folder"):
        load_problems(str(tmp_path))


@pytest.mark.shared_data
def test_every_row_of_gsm8k_loads(shared_data):
    rows = load_problems(str(shared_data / "gsm8k" / "train.jsonl"))
    assert len(rows) == 7473 and all("####" not in row["answer"] for row in rows)


def test_reasoning_gym_takes_its_options_and_a_seed():
    rows = load_problems(SUMS, size=30, seed=3)
    assert rows == load_problems(SUMS, size=30, seed=3) != load_problems(SUMS, size=30, seed=4)
    for row in rows:
        terms = row["question"].removeprefix("Calculate ").removesuffix(".").split(" + ")
        assert sum(map(int, terms)) == int(row["answer"])


@pytest.mark.parametrize("name", ["reasoning_gym:no_such_thing", "reasoning_gym:chain_sum?no_such_option=1"])
def test_an_unknown_generator_or_option_is_one_sentence(name):
    with pytest.raises(InputError, match="reasoning-gym cannot make"):
        load_problems(name)


def test_held_out_questions_are_distinct_and_never_trained_on():
    problems = load_problems(SUMS, size=500, seed=0)
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
    assert prompt_of("Calculate 1 + 1.", "####", ["Calculate 2 + 3.\n#### 5"], chat=False) == (
        "Calculate 2 + 3.\n#### 5\n\nCalculate 1 + 1.\n"
    )


def test_a_prompt_without_examples_says_what_the_marker_is_for():
    system, user = prompt_of("Calculate 1 + 1.", "ANSWER:", [], chat=True)
    assert "ANSWER:" in system["content"] and user == {"role": "user", "content": "Calculate 1 + 1."}
    assert "ANSWER:" in prompt_of("Calculate 1 + 1.", "ANSWER:", [], chat=False)


def test_an_example_without_the_marker_is_refused():
    with pytest.raises(InputError, match="carry the marker '####' once"):
        check_examples(["2 + 3 = 5 #### 5", "1 + 1 = 2"], "####")
