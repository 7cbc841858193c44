"""Sums of graded answers, against numbers worked out by hand or found in print."""

import pytest

from hrpo_patches.evaluation.statistics import majority, paired, pass_at, standard_error, summarise, wilson
from hrpo_patches.tasks.graders.numbers import number
from hrpo_patches.tasks.graders.options import choice


def test_the_standard_error_is_that_of_a_share_and_of_means():
    assert standard_error([1.0, 0.0, 1.0, 0.0]) == pytest.approx(0.25)
    assert standard_error([0.5, 0.5]) == 0 and standard_error([0.0, 0.5, 1.0]) == pytest.approx(0.5**0.5 / 3)


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),  # statsmodels' proportion_confint(method="wilson"), to four digits
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (94, 200, 0.4020, 0.5391),
        (1, 1000, 0.0002, 0.0056),
    ],
)
def test_wilsons_interval_is_wilsons(right, total, low, high):
    assert wilson(right, total) == pytest.approx((low, high), abs=1e-4)


def test_pass_at_k_is_the_unbiased_estimate():
    assert pass_at(1, 3, 10) == pytest.approx(0.3)
    assert pass_at(2, 1, 4) == pytest.approx(1 - 3 / 6)
    assert pass_at(4, 1, 4) == 1 and pass_at(2, 0, 4) == 0


def test_the_majority_joins_answers_that_are_the_same():
    def same(a, b):
        return float(a) == float(b)

    assert majority(["7", "8", "7.0", "8", "8.0", None], same) == "8"
    assert majority(["7", "8"], same) == "7"
    assert majority([None, ""], same) is None


def test_a_summary_counts_problems_and_samples():
    def sample(answer, right, tokens=10, marker=5):
        return {"answer": answer, "right": right, "tokens": tokens, "marker": marker}

    problems = [
        {"samples": [sample("7", True), sample("7", True), sample("8", False), sample(None, False, 20, None)]},
        {"samples": [sample("1", False), sample("2", False), sample("2", False), sample("3", True)]},
    ]
    golds = ["7", "3"]
    scores = summarise(problems, lambda i, answer: answer == golds[i], lambda a, b: a == b)
    assert (scores["right"], scores["total"], scores["mean"]) == (3, 8, 0.375)
    assert scores["mean_tokens"] == 11.25 and scores["marker_rate"] == 7 / 8
    assert scores["pass@1"] == 0.375 and scores["pass@4"] == 1 and scores["majority@4"] == 0.5
    assert scores["pass@2"] == pytest.approx((pass_at(2, 2, 4) + pass_at(2, 1, 4)) / 2)
    single = summarise([{"samples": [sample("7", True)]}], lambda i, answer: True, lambda a, b: True)
    assert "pass@1" not in single and single["mean"] == 1


def test_the_majority_reads_answers_as_the_graders_do():
    assert majority(["(A)", "(B)", "B.", "The answer is B"], choice) == "(B)"
    assert majority(["17", "18 apples", "$18"], number) == "18 apples"
    for doubtful in ("5 thousand", "more than 5", "not 5"):
        assert majority([doubtful, "5", "5", "7"], number) == "5"


def test_paired_verdicts_are_tested_by_those_that_differ():
    both = [True] * 30 + [False] * 30
    found = paired(both + [True] * 9 + [False], both + [False] * 9 + [True])
    assert (found["gained"], found["lost"]) == (9, 1) and found["difference"] == pytest.approx(8 / 70)
    assert found["p"] == pytest.approx(2 * (1 + 10) / 2**10)
    assert paired(both, both) == {"difference": 0.0, "gained": 0, "lost": 0, "p": 1.0}
