"""Formulas that would take math-verify long, and the clock that gives them up."""

import threading
import time
import types

import pytest

from hrpo_patches.tasks.graders.equal import equal
from hrpo_patches.tasks.graders.expressions import expression
from hrpo_patches.tasks.graders.numbers import number

HEAVY = [
    *[
        "(a+b+c+d)^{999}",
        "(1+i)^{9999}",
        "\\binom{9999999}{5000000}",
        "\\prod_{k=1}^{9999}(x+k)",
        "2^{99*99*99*99*99}",
    ],
    *["(a+b+c+d)^{99}", "2^{\\,9999999999}", "2^{+9999999999}", "2^{1\\cdot9999999999}", "2^{\\frac{9^{30}}{3}}"],
    *["2^{\\sqrt{9^{30}}}", "10^{9 \\cdot 10 ^ 9}", "\\Gamma(99999999)", "x^" * 99 + "2", "(" * 99 + "5" + ")" * 99],
    *[
        "\\begin{pmatrix}x&y\\\\z&w\\end{pmatrix}^{99}",
        "{" * 100 + "5" + "}" * 100,
        "(a+b+c+d)^9" * 6,
        "9^9^9",
        "9**9**9",
    ],
]


@pytest.mark.parametrize("grader", [expression, number])
def test_heavy_expressions_hold_up_no_thread(grader):
    times = {}

    def attempt():
        for answer in HEAVY:
            started = time.thread_time()
            grader("5", answer), grader(answer, "5")
            times[answer] = time.thread_time() - started

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(60)
    assert len(times) == len(HEAVY) and max(times.values()) < 1, times


@pytest.mark.parametrize("answer", ["\\frac{2}{4}", "x^2+2*x+1", "(x+1)^2", "\\sqrt{2}/2", "2\\pi", "\\frac{x}{y}"])
def test_light_expressions_are_compared_in_threads_too(answer):
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.append(expression(answer, f"0+{answer}")))
    thread.start()
    thread.join(10)
    assert verdicts == [True]


def test_heavy_expressions_are_given_up_in_the_main_thread():
    for answer in ("\\sum_{k=1}^{99999}\\sin(k)", "(a+b+c+d)^{99}"):
        started = time.thread_time()
        assert not expression("5", answer)
        assert time.thread_time() - started < 1, answer


def asleep():
    time.sleep(1)
    return True


def busy():
    started = time.thread_time()
    while time.thread_time() - started < 1:
        pass
    return True


@pytest.mark.parametrize(
    ("work", "package", "verdict"),
    [(busy, "sympy.core", False), (asleep, "sympy.core", True), (busy, "torch.cuda", True)],
)
def test_the_clock_counts_the_threads_own_time_and_interrupts_only_mathematics(work, package, verdict, monkeypatch):
    work = types.FunctionType(work.__code__, {"__name__": package, "time": time})
    monkeypatch.setattr("hrpo_patches.tasks.graders.equal._ask", lambda *_: work())
    assert equal("$1$", "$2$") is verdict
