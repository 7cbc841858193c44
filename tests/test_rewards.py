"""1 for the marker exactly once with the right answer after it, else 0."""

import threading

import pytest

from hrpo_patches.data import load_problems
from hrpo_patches.rewards import answer_of, answer_reward, grade, is_right


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
    assert grade(completion, gold, "####") == reward


def test_the_reward_reads_texts_and_conversations():
    reward = answer_reward("####")
    assert reward(["#### 7", "#### 8"], answer=["7", "7"], prompts=None) == [1.0, 0.0]
    assert reward([[{"role": "assistant", "content": "#### 7"}]], answer=["7"]) == [1.0]


def test_the_answer_is_the_first_line_after_the_marker():
    assert answer_of("x #### \n 7 \n8", "####") == "7"
    assert answer_of("none", "####") is None


def test_grading_works_outside_of_the_main_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(grade("#### 1,000", "1000", "####")))
    thread.start()
    thread.join()
    assert results == [1.0]


@pytest.mark.shared_data
def test_the_gold_answers_of_gsm8k_are_right_and_their_neighbours_wrong(shared_data):
    answers = [row["answer"] for row in load_problems(str(shared_data / "gsm8k" / "test.jsonl"))]
    assert len(answers) == 1319
    for gold, other in zip(answers, answers[1:] + answers[:1], strict=True):
        assert is_right(gold, f"{gold}.0" if "." not in gold else gold)
        if gold.replace(",", "") != other.replace(",", ""):
            assert not is_right(gold, other), (gold, other)
