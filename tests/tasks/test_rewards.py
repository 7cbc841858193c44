"""1 for the marker exactly once with the right answer after it, else 0."""

import threading

import pytest

from hrpo_patches.tasks import task_named
from hrpo_patches.tasks.rewards import answer_of, answer_reward, format_reward, grade

GSM8K = task_named("gsm8k")


def problem(gold):
    return {"question": "?", "answer": [gold]}


@pytest.mark.parametrize(
    ("completion", "gold", "reward"),
    [
        ("3 + 4 = 7\n#### 7", "7", 1),
        ("#### 7\n\nCalculate 1 + 1.", "7", 1),
        ("so ####7", "7", 1),
        ("#### 1,000", "1000", 1),
        ("#### $1000", "1,000", 1),
        ("#### 0.5", "1/2", 1),
        ("#### -3", "-3", 1),
        ("#### 42.", "42", 1),
        ("#### 18 dollars", "18", 1),
        ("#### **7**", "7", 1),
        ("#### 8", "7", 0),
        ("#### 3", "-3", 0),
        ("#### 70", "7", 0),
        ("7", "7", 0),
        ("#### 1 2 3 4 5 6 7", "7", 0),
        ("#### 8 or 7", "7", 0),
        ("#### 1/2", "0.5", 1),
        ("#### $\\frac{1}{2}$", "0.5", 1),
        ("#### 7 #### 7", "7", 0),
        ("########", "7", 0),
        ("####", "7", 0),
        ("####\n\n", "7", 0),
        ("#### seven?", "7", 0),
        ("#### __import__('os').system('exit')", "7", 0),
    ],
)
def test_a_completion_is_graded(completion, gold, reward):
    assert grade(GSM8K, problem(gold), completion, "####") == reward


def test_the_reward_reads_texts_and_conversations():
    reward = answer_reward(GSM8K, "####")
    columns = {"question": ["?", "?"], "answer": [["7"], ["7"]], "trainer_state": None}
    assert reward(["#### 7", "#### 8"], prompts=["?", "?"], **columns) == [1.0, 0.0]
    conversation = [[{"role": "assistant", "content": "#### 7"}]]
    assert reward(conversation, question=["?"], answer=[["7"]]) == [1.0]


def test_any_of_several_golds_is_right():
    reward = answer_reward(task_named("nq"), "####")
    assert reward(["#### the UK"] * 2, question=["?"] * 2, answer=[["Britain", "UK"], ["Britain"]]) == [1.0, 0.0]


def test_the_reward_for_the_format_asks_for_the_marker_once_and_something_after_it():
    completions = ["#### 7", "7", "#### 7 #### 7", "####\n", [{"role": "assistant", "content": "so #### x"}]]
    assert format_reward("####")(completions, answer=None) == [1.0, 0.0, 0.0, 0.0, 1.0]


def test_the_answer_is_the_first_line_after_the_marker():
    assert answer_of("x #### \n 7 \n8", "####") == "7"
    assert answer_of("none", "####") is None


def test_grading_works_outside_of_the_main_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(grade(GSM8K, problem("1000"), "#### 1,000", "####")))
    thread.start()
    thread.join()
    assert results == [1.0]


def test_a_message_whose_reasoning_is_told_apart_at_the_marker_is_whole_again():
    message = {"role": "assistant", "reasoning_content": "3 + 4 is\n", "content": "\n7"}
    reward = answer_reward(GSM8K, "</think>")
    assert reward([[message]], question=["?"], answer=[["7"]]) == [1.0]
    assert reward([[message | {"content": "8"}]], question=["?"], answer=[["7"]]) == [0.0]
