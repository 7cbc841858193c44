"""MATH (Hendrycks et al., arXiv 2103.03874): competition problems with an expression in LaTeX for an answer."""

from __future__ import annotations

from hrpo_patches.tasks.base import Problem, Row, Task, Unreadable, steps, text
from hrpo_patches.tasks.graders.expressions import expression
from hrpo_patches.tasks.graders.markup import closing

BOXED = "\\boxed"


def boxed(solution: str) -> str:
    """What the last box of a solution holds; braces may be nested, and left out around one character."""
    rest = solution.rpartition(BOXED)[2].lstrip()
    if BOXED not in solution or not rest:
        raise Unreadable(f"has no {BOXED} answer in its solution")
    if not rest.startswith("{"):
        return rest[0]
    end = closing(rest, 1)
    if end is None:
        raise Unreadable(f"has a {BOXED} without its closing brace")
    return rest[1:end].strip()


def read_solution(row: Row) -> Problem:
    """As in MATH itself: the answer is in the solution's last box."""
    return {"question": text(row, "problem"), "answer": [boxed(str(row["solution"]))]}


def read_answer(row: Row) -> Problem:
    """As in MATH-500: the answer has a column of its own."""
    return {"question": text(row, "problem"), "answer": [text(row, "answer")]}


TASK = Task(
    name="math",
    train=("DigitalLearningGmbH/MATH-lighteval@train",),
    test=("HuggingFaceH4/MATH-500@test",),
    shapes={("problem", "answer"): read_answer, ("problem", "solution"): read_solution},
    instruction=steps("\\frac{1}{2}"),
    examples=(
        "What is the sum of the roots of $x^2 - 5x + 6 = 0$?\n"
        "The polynomial is $(x - 2)(x - 3)$, so the roots are 2 and 3, and $2 + 3 = 5$. {marker} 5",
        "A fair die is rolled once. What is the probability of a prime number?\n"
        "2, 3 and 5 are prime, so it is $\\frac{3}{6} = \\frac{1}{2}$. {marker} \\frac{1}{2}",
        "Simplify $\\sqrt{50} - \\sqrt{8}$.\n"
        "$\\sqrt{50} = 5\\sqrt{2}$ and $\\sqrt{8} = 2\\sqrt{2}$; their difference is $3\\sqrt{2}$. "
        "{marker} 3\\sqrt{2}",
    ),
    grader=expression,
)
